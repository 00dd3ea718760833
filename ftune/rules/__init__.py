"""What ftune refuses, warns about, or notes, as a table over facts that methods declare."""

from ftune.rules.check import check, is_machine_rule, newly_broken
from ftune.rules.rule import Facts, Rule
from ftune.rules.table import RULES

__all__ = ["RULES", "Facts", "Rule", "check", "is_machine_rule", "newly_broken"]
