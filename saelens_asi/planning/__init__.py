"""Before a run: which SAEs a budget affords at a hook, and what each will give."""

from saelens_asi.planning.make import PilotSizes, plan
from saelens_asi.planning.record import Plan, PlanRow

__all__ = ["PilotSizes", "Plan", "PlanRow", "plan"]
