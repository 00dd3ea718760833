"""What to execute for a run on several processes: pure, nothing is started here and nothing needs torch."""

from ftune.launch.plan import Interface, LaunchPlan, Layout, agent_plan, node_command

__all__ = ["Interface", "LaunchPlan", "Layout", "agent_plan", "node_command"]
