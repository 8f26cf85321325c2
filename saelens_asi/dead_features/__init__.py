"""Why features of an SAE are dead: an autopsy of each, by changing one thing about it at a time."""

from saelens_asi.dead_features.examine import autopsy
from saelens_asi.dead_features.record import VERDICTS, Autopsy, AutopsySettings

__all__ = ["VERDICTS", "Autopsy", "AutopsySettings", "autopsy"]
