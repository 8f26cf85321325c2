from saelens_asi.cli import main

main()
