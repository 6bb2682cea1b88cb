"""The job spec: what a person writes down to say what is asked of which images.

Every key carries its documentation in `Field(description=...)`: the reference page and
`lavaflow spec --schema` are made from it. Specs are frozen, and an unknown key is an error.
This module knows what a spec may say, not where it comes from (`jobs/load.py`).
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from schemas.ask import DRAWN, ROW_QUESTIONS, Ask, AskRow, GenerateSpec, contradiction, default_of
from schemas.base import Spec

EMBEDDED = "embedded"


class StorageSpec(Spec):
    """How to reach a store. Secrets come from the environment only, never from the spec."""

    endpoint_url: str | None = Field(None, description="URL of an S3-compatible server.")
    anon: bool = Field(False, description="Read public buckets without credentials.")
    profile: str | None = Field(None, description="Named profile of the AWS credentials file.")
    timeout_s: float = Field(
        15.0,
        gt=0,
        description="Seconds that a server may stay silent; then the request is lost, and sent "
        "again on another connection.",
    )


class ColumnsSpec(Spec):
    """Where a source keeps what a row needs; only what differs from the default is written."""

    image: str | tuple[str, ...] | None = Field(
        None,
        description="webdataset: suffix of the image member (`jpg`); null takes the first member "
        "with a known image suffix. parquet: column with the bytes, the path or the URL of the "
        "image; manifest: column with its path or URL; null takes the one that is called so. A "
        "list of suffixes or columns, or a column that holds lists, puts several images in each "
        "prompt, in this order.",
    )
    id: str = Field(
        "__key__",
        description="Column that becomes `sample_id`; `__key__` is the tar key, the `id` of a "
        "manifest's row, or the name of the image's file; in parquet, the column of that name, "
        "else the image's path or URL, else the row's number.",
    )
    questions: str = Field(
        "questions",
        description="Column with the row's own questions, for `from: questions`. In a manifest "
        "without it, the questions of VQA's and LLaVA's files are known by their shape.",
    )
    conversation: str | None = Field(
        None,
        description="Column with earlier turns, a list of {role, content}, that each question "
        "continues; manifest: or LLaVA's list of {from, value}.",
    )

    @field_validator("image")
    @classmethod
    def _image_is_named(cls, image: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if not isinstance(image, tuple):
            return image
        if not all(image) or len({*image}) < len(image):
            raise ValueError("holds a name that is empty or there twice; name each image once")
        if not image:
            raise ValueError("is empty; name the image, or several")
        return image[0] if len(image) == 1 else image

    @property
    def images(self) -> tuple[str, ...]:
        """The names in `image`; none where the source is to tell."""
        return (self.image,) if isinstance(self.image, str) else self.image or ()


class SourceSpec(Spec):
    """Where the images are."""

    format: Literal["webdataset", "parquet", "images", "manifest"] = Field(
        description="webdataset: tar shards of samples; parquet: tables with an image column; "
        "images: one file an image; manifest: JSON or JSONL that names images."
    )
    path: str | tuple[str, ...] = Field(
        description="fsspec URL or local path: a file, a folder, a glob (`*.tar`), a brace range "
        "(`{00000..00099}.tar`), or a list of them; images: also a `.txt` or `.lst` file with one "
        "path or URL a line."
    )
    columns: ColumnsSpec = Field(ColumnsSpec(), description="Names of the columns to read.")
    keep: tuple[str, ...] = Field(
        (),
        description="Source columns carried into the answer table: parquet's with their types, "
        "others as JSON text.",
    )
    image_root: str | None = Field(
        None,
        description="parquet, manifest, lists: folder or URL before image paths that are relative; "
        "null: the folder of the file that names them.",
    )
    image_timeout_s: float = Field(
        30.0,
        gt=0,
        description="Seconds that one try at fetching an image may take, where it is a file of its "
        "own; it is tried three times, in a store of this spec five times.",
    )
    limit: int | None = Field(
        None,
        gt=0,
        description="Only so many rows, the first ones, counted before `where`; shards whose "
        "length is not known are then read one after the other. The same job without it goes on "
        "from there.",
    )
    where: str | None = Field(
        None,
        description="Condition over a row's columns, as `width >= 512 and license in ['cc0']`; "
        "rows for which it does not hold are `skipped`.",
    )
    max_image_pixels: int = Field(
        178_956_970,
        gt=0,
        description="Images with more pixels become failed rows before they are decoded.",
    )
    max_image_bytes: int = Field(
        256 * 2**20,
        gt=0,
        description="Images of more bytes become failed rows before they are decoded.",
    )
    decode: Literal["exact", "fast"] = Field(
        "exact",
        description="exact: the pixels that the model's processor sees; fast: large JPEGs are "
        "decoded at a fraction of their size, which changes pixels a little.",
    )
    allow_truncated: bool = Field(
        False,
        description="Decode images that are cut off, grey or black where bytes are missing; else "
        "they are failed rows.",
    )
    on_change: Literal["replace", "keep"] = Field(
        "replace",
        description="replace: answers about a shard that has changed since give way to new ones, "
        "those about a shard that is gone are removed; keep: they stay as they are, if the shard "
        "was complete, and its new version is not read.",
    )
    storage: StorageSpec = Field(StorageSpec(), description="How to reach the source.")

    @field_validator("path")
    @classmethod
    def _path_is_not_empty(cls, path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not path or not all(path if isinstance(path, tuple) else (path,)):
            raise ValueError("is empty; name a file, a folder, a glob or a list of them")
        return path

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


class ModelSpec(Spec):
    """Which LLaVA answers."""

    path: str = Field(
        EMBEDDED,
        description="Hub id, local folder, URL of a folder in a store (downloaded once on each "
        "machine), or `embedded`: the small model inside the package, which knows coloured shapes "
        "only.",
    )
    revision: str | None = Field(
        None,
        description="Branch, tag or commit of a hub id; of a URL, the digest of its files that a "
        "run has recorded.",
    )
    storage: StorageSpec = Field(
        StorageSpec(), description="How to reach the model, where `path` is a URL."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: the checkpoint's own (`embedded` runs in float32).",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention kernel, as transformers' `attn_implementation`. flash_attention_2: "
        "flash-attn's, on a GPU, in bfloat16 or float16; questions are packed with it, too.",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Weights of the text model's linear layers in 8 or 4 bits, by bitsandbytes "
        "(`pip install 'lavaflow[quantization]'`); the vision tower, the projector and the output "
        "layer keep `dtype`. Answers are other ones than without, and in 8 bits may depend on what "
        "else is in the batch.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where the generate actor sees a GPU, else the CPU."
    )
    chat_template: str | None = Field(
        None,
        description="How a conversation is written: vicuna, mistral, llama-3, chatml, plain, or a "
        "Jinja chat template; null: the checkpoint's own, else the one that its text model was "
        "trained with.",
    )
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None = Field(
        None,
        description="How the model is spread over the GPUs of one actor, as transformers' "
        "`device_map`: by itself, or module by module (`{model.vision_tower: 0, ...}`). null: on "
        "one device; with `resources.generate.gpus` above 1, auto. Such a model reads a prompt for "
        "each question (`pip install 'lavaflow[device-map]'`).",
    )
    allow_pickle: bool = Field(
        False,
        description="Load weights from `.bin` files where there are no safetensors. They are "
        "pickles, which can run code; they are opened by torch's `weights_only`, which takes "
        "tensors alone.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the Python files that a checkpoint brings and names in `auto_map`, here "
        "and on every worker. Read them first.",
    )
    system_prompt: str | None = Field(
        None, description="Text put in front of every conversation, as the template renders it."
    )

    @model_validator(mode="after")
    def _spread_models_keep_their_weights(self) -> "ModelSpec":
        if self.device_map is not None and self.quantization != "none":
            raise ValueError(
                f"model.device_map: does not go with model.quantization {self.quantization}: drop "
                "one of them"
            )
        return self


class OutputSpec(Spec):
    """Where the answer table goes."""

    path: str = Field(min_length=1, description="fsspec URL or local folder of the output.")
    rows_per_file: int = Field(
        50_000, gt=0, description="Answers that fill one Parquet file of the table."
    )
    commit_interval_s: float = Field(
        60.0,
        ge=0,
        description="Seconds after which an answer is durable at the latest, once its batch is "
        "done; 0 stages every batch by itself.",
    )
    lease_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without a sign of life after which a run on another machine counts "
        "as dead, and the next one takes its output over.",
    )
    retry_s: float = Field(
        60.0,
        ge=0,
        description="Seconds for which a store that fails (full, forbidden, not reached) is tried "
        "again, at growing intervals, before the run ends.",
    )
    prompts: bool = Field(False, description="Write the rendered prompt beside each answer.")
    storage: StorageSpec = Field(StorageSpec(), description="How to reach the output.")


class PreprocessResources(Spec):
    """The CPU actors that decode images and tokenise prompts."""

    actors: tuple[int, int] | None = Field(
        None, description="Fewest and most actors; null: from the cluster's CPUs."
    )
    cpus: float | None = Field(
        None, ge=0.001, description="Logical CPUs of one actor; null: 1, less on small machines."
    )
    decode_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds that decoding one image may take; else it is a failed row.",
    )
    decode_memory_bytes: int = Field(
        2 * 2**30,
        ge=64 * 2**20,
        description="Memory that decoding one image may take; else it is a failed row. On Linux.",
    )

    @field_validator("actors")
    @classmethod
    def _range_is_ordered(cls, actors: tuple[int, int] | None) -> tuple[int, int] | None:
        if actors and not 1 <= actors[0] <= actors[1]:
            raise ValueError("wants [fewest, most] with 1 <= fewest <= most")
        return actors


class GenerateResources(Spec):
    """The accelerator actors, one model each."""

    actors: int | None = Field(
        None, gt=0, description="Actors; null: one for each GPU of the cluster, else one."
    )
    cpus: float | None = Field(
        None, ge=0, description="Logical CPUs of one actor; null: 1, less on small machines."
    )
    gpus: float | None = Field(
        None, ge=0, description="GPUs of one actor; null: 1 where the cluster has any, else 0."
    )

    @field_validator("gpus")
    @classmethod
    def _gpus_are_whole_above_one(cls, gpus: float | None) -> float | None:
        if gpus and gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g}: Ray shares one GPU or gives whole ones; round it")
        return gpus

    batch_size: int = Field(16, gt=0, description="Images that are handed over together.")
    compile: bool = Field(
        False,
        description="Have torch compile the text model before the first answer, and on a CPU the "
        "rest of the model, too; on a GPU, steps are recorded and done again as CUDA graphs. For "
        "large models and long jobs: it takes two or three minutes on each actor and, on a CPU, a "
        "C++ compiler and memory for the weights three times.",
    )
    kv_budget_bytes: int | None = Field(
        None,
        gt=0,
        description="Bytes that keys and values of prompts in work may take, on each actor; null: "
        "four fifths of the GPU's memory that the model leaves; on a CPU a quarter of the "
        "machine's, or of its container's.",
    )


class ResourcesSpec(Spec):
    """What the job asks of the Ray cluster; the driver never probes hardware."""

    preprocess: PreprocessResources = Field(PreprocessResources(), description="CPU actors.")
    generate: GenerateResources = Field(GenerateResources(), description="Accelerator actors.")
    bytes_in_flight: int | None = Field(
        None,
        gt=0,
        description="Images and pixels that lie between the stages, in Ray's object store: no "
        "stage begins anything while they are more bytes; null: 256 MiB for each actor.",
    )


class JobSpec(Spec):
    """One job: a source, what is asked, a model, and where the answers go."""

    name: str = Field("lavaflow", min_length=1, description="Name of the job, for people.")
    source: SourceSpec = Field(description="Where the images are.")
    ask: tuple[Ask, ...] = Field(
        description="The questions: {id, prompt} asks every image, {from: questions} asks each "
        "row's own.",
    )
    model: ModelSpec = Field(ModelSpec(), description="Which LLaVA answers.")
    generate: GenerateSpec = Field(GenerateSpec(), description="How answers are decoded.")
    output: OutputSpec = Field(description="Where the answer table goes.")
    resources: ResourcesSpec = Field(ResourcesSpec(), description="What the job runs on.")
    max_failed_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="A complete run with a larger fraction of failed answers ends with status 3; "
        "one that cannot do better is ended early, with status 1, from 1,000 answers on.",
    )
    grace_period_s: float = Field(
        60.0,
        ge=0,
        description="Seconds that an interrupted run takes at most to finish what is in flight.",
    )

    @model_validator(mode="after")
    def _question_ids_are_distinct(self) -> "JobSpec":
        if not self.ask:
            raise ValueError("ask: is empty; give at least one {id, prompt} or {from: questions}")
        seen: set[str] = set()
        for unit in self.units:
            if unit in seen:
                raise ValueError(f"ask: the id {unit!r} is given twice; ids must be distinct")
            seen.add(unit)
        return self

    @model_validator(mode="after")
    def _decoding_is_consistent(self) -> "JobSpec":
        for number, ask in enumerate(self.ask):
            if mistake := contradiction(ask, self.decoding(ask)):
                raise ValueError(f"ask.{number}: {mistake}")
        narrowed = [name for name in DRAWN if getattr(self.generate, name) != default_of(name)]
        if narrowed and not any(self.decoding(ask).temperature for ask in self.ask):
            raise ValueError(
                f"generate.{narrowed[0]}: has no effect at temperature 0, which always takes the "
                "likeliest token: drop it, or set generate.temperature"
            )
        return self

    @property
    def units(self) -> tuple[str, ...]:
        """The units of coverage: each question's id, and `questions` for the rows' own."""
        return tuple(ROW_QUESTIONS if isinstance(a, AskRow) else a.id for a in self.ask)

    def decoding(self, ask: Ask) -> GenerateSpec:
        """`generate` with what the question says otherwise."""
        return self.generate.model_copy(update=ask.decoded)

    def turns(self, ask: Ask) -> int:
        """How many questions each of this entry's asks, one after the other."""
        return 1 if isinstance(ask, AskRow) else max(len(ask.texts), 1)

    def samples(self, ask: Ask) -> int:
        """How many answers each question of this entry has: one, where none is drawn."""
        decoding = self.decoding(ask)
        return decoding.n if decoding.temperature and not ask.choices else 1
