from saelens_asi_cli import main

main()
