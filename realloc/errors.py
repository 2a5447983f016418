"""Errors that a user may see. Anything else that is raised is a bug of ours.

Every message says what is wrong, where, the numbers, and what to change. The CLI prints the
message alone and exits with `exit_code`.
"""


class ReallocError(Exception):
    """Base of all errors meant for users."""

    exit_code = 2


class InputError(ReallocError):
    """A file, option or value that the user gave is wrong."""


class PlanError(InputError):
    """A plan contradicts its cluster, its models or itself."""


class InfeasibleError(InputError):
    """No plan fits the cluster."""


class RunError(ReallocError):
    """A run started and failed: a rank died, a disk filled up, a loss became NaN."""

    exit_code = 1
