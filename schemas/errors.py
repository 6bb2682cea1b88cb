"""The one tree of errors.

    LavaflowError
    ├── SpecError                 bad usage or a bad spec: raised before Ray starts, exit status 2
    ├── JobError                  the job cannot go on: exit status 1
    │   └── StoreUnavailable      a store failed while a shard was read: what is left is read again
    ├── OutputHeld                another run writes to this output: exit status 75
    └── RowError                  becomes one failed row, never the end of a job
        ├── ReadError             stage `read`
        │   ├── ShardUnreadable       the row is lost in a damaged shard, or the shard ends in it
        │   ├── ManifestMalformed     a line of a manifest that is no JSON object
        │   ├── ImageMissing          a sample without an image
        │   ├── ImageUnreachable      the server of an image fails, or takes too long
        │   ├── ColumnMalformed       a kept column's value does not fit the table's column
        │   ├── FilterFailed          `source.where` cannot be evaluated for the row
        │   └── QuestionsMalformed    the row's questions cannot be known
        ├── DecodeError           stage `decode`
        │   ├── ImageEmpty            zero bytes
        │   ├── ImageUnidentified     no decoder knows these bytes
        │   ├── ImageCorrupt          a decoder knows them and fails
        │   ├── ImageTooLarge         more pixels, bytes or memory than the spec allows
        │   ├── DecoderCrashed        decoding it ended the process that decodes, twice
        │   └── DecoderTimedOut       decoding it took longer than the spec allows
        ├── PromptError           stage `prompt`
        │   ├── ConversationMalformed the row's conversation cannot be read as turns
        │   ├── ImageTokenInText      text that would be taken for an image
        │   ├── TemplateFailed        prompt or chat template cannot be filled in
        │   ├── ConditionFailed       `when` cannot be evaluated for the row
        │   ├── PromptTooLong         prompt and answer do not fit the model's context
        │   └── ChoiceUnwritable      the model's tokens do not tell one choice from another
        └── GenerateError         stage `generate`
            ├── TokenFeatureMismatch  image tokens in the prompt, image features of the model
            ├── NonFiniteLogits       the model answered NaN or infinity
            ├── IncompleteJson        the answer's JSON was cut off at the token limit
            └── DeviceOutOfMemory     the row does not fit the device alone

The name of a row error's class is what the answer table says in `error_class`: these names are
public and stable. A message names the subject, the value and the remedy.
"""

from typing import ClassVar, TypeVar


class LavaflowError(Exception):
    """Everything that Lavaflow raises on purpose."""


class SpecError(LavaflowError):
    """A mistake in the spec, the command line or what they name; nothing was started."""


class JobError(LavaflowError):
    """The job cannot go on; what was committed stays and the same command resumes it."""


class StoreUnavailable(JobError):
    """A store failed while a shard was read. Nothing is known of the rows that are left."""


class OutputHeld(LavaflowError):
    """Another run holds the lease of this output. The message names it: host, pid, since when."""


class RowError(LavaflowError):
    """One row that cannot be answered. `stage` and the class's name reach the answer table."""

    stage: ClassVar[str]


E = TypeVar("E", bound=RowError)


def about_image(error: E, *, number: int, count: int) -> E:
    """The same error, which says of which of its row's images it is."""
    return error if count == 1 else type(error)(f"image {number} of {count}: {error}")


class ReadError(RowError):
    stage = "read"


class ShardUnreadable(ReadError):
    pass


class ManifestMalformed(ReadError):
    pass


class ImageMissing(ReadError):
    pass


class ImageUnreachable(ReadError):
    pass


class ColumnMalformed(ReadError):
    pass


class FilterFailed(ReadError):
    pass


class QuestionsMalformed(ReadError):
    pass


class DecodeError(RowError):
    stage = "decode"


class ImageEmpty(DecodeError):
    pass


class ImageUnidentified(DecodeError):
    pass


class ImageCorrupt(DecodeError):
    pass


class ImageTooLarge(DecodeError):
    pass


class DecoderCrashed(DecodeError):
    pass


class DecoderTimedOut(DecodeError):
    pass


class PromptError(RowError):
    stage = "prompt"


class ConversationMalformed(PromptError):
    pass


class ImageTokenInText(PromptError):
    pass


class TemplateFailed(PromptError):
    pass


class ConditionFailed(PromptError):
    pass


class PromptTooLong(PromptError):
    pass


class ChoiceUnwritable(PromptError):
    pass


class ProcessorRefused(PromptError):
    pass


class GenerateError(RowError):
    stage = "generate"


class TokenFeatureMismatch(GenerateError):
    pass


class NonFiniteLogits(GenerateError):
    pass


class IncompleteJson(GenerateError):
    pass


class DeviceOutOfMemory(GenerateError):
    pass
