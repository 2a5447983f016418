"""Errors that a user may see. Anything else that is raised is a bug of ours.

Every message says what is wrong, where, the numbers, and what to change. The CLI prints the
message alone and exits with `exit_code`.
"""

MAX_MESSAGE = 6000
"""Characters that a person may be shown: a message may quote what a damaged file says."""


class ReallocError(Exception):
    """Base of all errors meant for users."""

    exit_code = 2

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= MAX_MESSAGE:
            return text
        half = MAX_MESSAGE // 2
        return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


class InputError(ReallocError):
    """A file, option or value that the user gave is wrong."""


class PlanError(InputError):
    """A plan contradicts its cluster, its models or itself."""


class InfeasibleError(InputError):
    """No plan fits the cluster."""


class RunError(ReallocError):
    """A run started and failed: a rank died, a disk filled up, a loss became NaN."""

    exit_code = 1
