"""What can be wrong with a checkpoint. Each message is one line that names the file and, if there is one, the tensor.

Imports nothing: a command line can catch these without loading torch. Knows no file format.
"""

from __future__ import annotations


class CheckpointError(ValueError):
    """The weights on disk cannot be loaded. The subclass says why; the text says which file and tensor."""


class NoCheckpoint(CheckpointError):
    """The directory is absent, or holds no safetensors file."""


class MissingShard(CheckpointError):
    """The index names a file that is not there."""


class MalformedFile(CheckpointError):
    """A header or an index is not what its format says."""


class TruncatedShard(CheckpointError):
    """A file ends before its header says so, or became shorter while it was read."""


class TrailingBytes(CheckpointError):
    """A file goes on after the last tensor of its header."""


class IndexDisagrees(CheckpointError):
    """The index and the headers of the shards do not name the same tensors in the same files."""


class DuplicateTensor(CheckpointError):
    """A tensor is stored twice."""


class MissingTensor(CheckpointError):
    """The model has a parameter that the checkpoint does not fill."""


class UnknownTensor(CheckpointError):
    """The checkpoint holds a tensor that the model has no place for."""


class WrongShape(CheckpointError):
    """A tensor does not have the shape that config.json promises."""


class WrongDtype(CheckpointError):
    """A tensor's dtype cannot become the parameter's, or one of its values does not fit."""


class TiedWeightsDiffer(CheckpointError):
    """config.json ties two tensors that the checkpoint stores with different values."""


class BadQuantization(CheckpointError):
    """A quantized tensor is of a kind that cannot be held, or its scales or integers are not numbers of their kind."""
