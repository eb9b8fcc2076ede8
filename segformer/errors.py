"""The errors that a user can cause or must act on, and nothing else.

    SegformerError          exit code 2, one line, no traceback
    +-- ConfigError         a setting, alone or beside another, makes no sense
    +-- DataError           a data set, shard, image or mask is missing or damaged
    +-- CheckpointError     a checkpoint or export is missing, damaged or of another model
    +-- Diverged            the loss or the gradients stopped being finite, and going back did not help
    +-- Preempted           exit code 75 (EX_TEMPFAIL): stopped by a signal, all is saved; start again
    +-- RunTaken            another process has taken over the run directory of this one
    +-- RankLost            exit code 76: another rank ended or hangs; start again

A message says what is wrong, where, what was found and what to do. Anything else that is raised is a bug of
this program and keeps its traceback.
"""


class SegformerError(Exception):
    """What the command line prints as one line before it exits with `exit_code`."""

    exit_code = 2


class ConfigError(SegformerError):
    """A setting is wrong, alone or together with another one."""


class DataError(SegformerError):
    """A data set, shard, image or mask is missing, damaged or inconsistent."""


class CheckpointError(SegformerError):
    """A checkpoint or exported model is missing, damaged or belongs to another model."""


class Diverged(SegformerError):
    """Training can't go on: several steps in a row gave a loss or gradients that are not finite."""


class Preempted(SegformerError):
    """Training stopped at a signal after saving its state; the same command continues it."""

    exit_code = 75


class RunTaken(SegformerError):
    """Another process has taken over the run directory of this one, which must not write any more."""


class RankLost(SegformerError):
    """Another rank has ended or did not join a collective in time; the same command continues the run."""

    exit_code = 76
