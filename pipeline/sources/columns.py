"""Arrow columns of a table: which of them is the image, and what makes values fit a type.

Pure: schemas and arrays in, names, types and values out.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.types as pt

MOST_LISTED = 30

IMAGE_NAMES = frozenset(
    {"image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo"}
    | {"image_bytes", "image_data", "image_path", "image_file", "image_url", "image_uri"}
    | {"img_path", "img_url", "path", "file", "file_name", "filename", "file_path", "filepath"}
    | {"url", "uri"}
)
"""What columns of images are called, in lower case."""


class Unfit(Exception):
    """Columns or values that are not what is needed; the text says why."""


def image_columns(schema: pa.Schema, asked: Sequence[str]) -> Sequence[str]:
    """The columns with the images: those that are asked for, else the only one that can be meant.

    Raises Unfit with the columns that there are.
    """
    for name in asked:
        if not is_image(column_type(schema, name)):
            raise Unfit(
                f"column {name!r} is {schema.field(name).type}; an image is binary, a struct "
                "{bytes, path}, or text that is a path or a URL; several are a list of these"
            )
    if asked:
        return asked
    held = [f.name for f in schema if _is_struct_of_image(f.type) or _is_bytes(f.type)]
    named = [f.name for f in schema if _is_text(f.type) and f.name.lower() in IMAGE_NAMES]
    found = held or named or [f.name for f in schema if _are_images(f.type)]
    if len(found) > 1:
        found = [name for name in held if name.lower() in IMAGE_NAMES] or found
    if len(found) != 1:
        problem = f"may be any of {', '.join(found)}" if found else "is none that is known"
        raise Unfit(
            f"the column with the images {problem}; name it in source.columns.image; "
            f"there are {listed(schema)}"
        )
    return [str(found[0])]


def column_type(schema: pa.Schema, name: str) -> pa.DataType:
    """The plain type of a column; raises Unfit where there is none or more than one."""
    if (times := schema.names.count(name)) != 1:
        problem = f"{times} columns" if times else "no column"
        raise Unfit(f"there is {problem} {name!r}; there are {listed(schema)}")
    return plain(schema.field(name).type)


def listed(schema: pa.Schema) -> str:
    names = [f"{field.name} ({_short(field.type)})" for field in schema]
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more if names else "none"


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this plain type can hold images, or say where they are."""
    if is_list(kind):
        return not is_list(kind.value_type) and is_image(kind.value_type)
    bytes_like = _is_bytes(kind) or pt.is_fixed_size_binary(kind)
    return bytes_like or _is_text(kind) or _is_struct_of_image(kind) or bool(pt.is_null(kind))


def is_list(kind: pa.DataType) -> bool:
    """Of a plain type."""
    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def _are_images(kind: pa.DataType) -> bool:
    """Whether each value is a list of images as they are, not of where they are."""
    kind = plain(kind)
    return is_list(kind) and (_is_bytes(kind.value_type) or _is_struct_of_image(kind.value_type))


def _is_struct_of_image(kind: pa.DataType) -> bool:
    """As the Image feature of Hugging Face's datasets is stored."""
    if not pt.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    data, path = fields.pop("bytes", pa.null()), fields.pop("path", pa.null())
    is_held = _is_bytes(data) or _is_text(path)
    return is_held and not fields and (_is_bytes(data) or pt.is_null(data))


def _is_bytes(kind: pa.DataType) -> bool:
    kind = plain(kind)
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = plain(kind)
    return bool(pt.is_string(kind) or pt.is_large_string(kind))


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without what is only a way of storing it, at any depth.

    Dictionaries become their values, extensions their storage, views what they view; every field
    may be null.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type)
    if pt.is_dictionary(kind):
        return plain(kind.value_type)
    if pt.is_struct(kind):
        return pa.struct([pa.field(field.name, plain(field.type)) for field in kind])
    if pt.is_map(kind):
        return pa.map_(plain(kind.key_type), plain(kind.item_type))
    if pt.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type), kind.list_size)
    if pt.is_large_list(kind) or pt.is_large_list_view(kind):
        return pa.large_list(plain(kind.value_type))
    if pt.is_list(kind) or pt.is_list_view(kind):
        return pa.list_(plain(kind.value_type))
    if pt.is_string_view(kind) or pt.is_binary_view(kind):
        return pa.string() if pt.is_string_view(kind) else pa.binary()
    return kind


def has_null_type(kind: pa.DataType) -> bool:
    """Whether the type leaves something open, as where a file holds nothing but nulls."""
    children = [kind.field(n).type for n in range(kind.num_fields)]
    return bool(pt.is_null(kind)) or any(map(has_null_type, children))


def fitted(value: pa.Array, kind: pa.DataType) -> pa.Scalar | Unfit | None:
    """The one value of an array as a scalar of `kind`: None for null, Unfit where it would change.

    That is told by casting it there and back.
    """
    if not value[0].is_valid:
        return None
    try:
        value.validate(full=True)
        made = value if value.type == kind else value.cast(kind)
        # Compared as text: what is no number equals nothing.
        if made is not value and repr(made.cast(value.type).to_pylist()) != repr(value.to_pylist()):
            return Unfit(f"is {_short(value.type)} and would change as {_short(kind)}")
        return _named_alike(made[0], kind)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return Unfit(f"is no {_short(kind)}: {error}")


def _named_alike(value: pa.Scalar, kind: pa.DataType) -> pa.Scalar:
    """The value with the type's own names of what is in lists and maps.

    Types that differ in nothing else are equal, but cannot always be put into one array.
    """
    try:
        return pa.array([value], kind)[0]
    except pa.ArrowInvalid:
        return pa.scalar(value.as_py(), kind)
