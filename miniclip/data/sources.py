"""What people have -> a sequence of pairs, each image with its captions.

| source                                        | images                              | captions                   |
|-----------------------------------------------|-------------------------------------|----------------------------|
| a folder, sub-folders and all                 | its image files                     | the `.txt` of the same name|
| `.csv`, `.tsv`, `.jsonl`, `.parquet`, `.json` | a column of paths, URLs or pictures | one column or several      |
| a folder or a pattern of Parquet files        | the same                            | the same                   |
| COCO's or Karpathy's captions, a `.json`      | `file_name`                         | `annotations`, `sentences` |
| a set of Hugging Face's `datasets`            | the column of images                | one column or several      |

Only names and tables are read at once: `pairs[i]` reads the rest, wherever it is called. How each kind is read is in
`reading/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .reading.folders import read_folder
from .reading.huggingface import HUB_PREFIX, is_datasets_folder, read_datasets
from .reading.pair import Pairs
from .reading.parquet import ParquetRows
from .reading.rows import pairs_of_rows
from .reading.scan import image_files
from .reading.tables import beside_parquet, folder_of, is_parquet, is_pattern, parquet_files, read_table


def read_pairs(
    source: str | Path,
    *,
    images: str | Path | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split: str | None = None,
    default_split: str = "train",
) -> Pairs:
    """The pairs of any source in the table above.

    Args:
        images: the folder that a table's paths are relative to; by default the table's own.
        image_column, caption_columns: of a table, the second of a folder's `metadata.jsonl` as well; by default found
            by their names.
        split: the part to read, which must be there.
        default_split: where `split` is None, the part of a source that has several.

    Raises:
        ValueError: no such source, no such split, a table without the columns that are needed, or paths that lead
            nowhere.
    """
    path, part, is_asked_for = Path(source), split or default_split, split is not None
    if str(source).startswith(HUB_PREFIX) or is_datasets_folder(path):
        return read_datasets(str(source), image_column, caption_columns, part, is_asked_for)
    if is_pattern(str(source)):
        files = parquet_files(path)
        if any(file.suffix.lower() != ".parquet" for file in files):
            raise ValueError(f"{source} is a pattern of {files[0].suffix or 'other'} files; patterns are for Parquet")
    elif not path.exists():
        raise ValueError(f"no folder or file {source}")
    elif path.is_dir() and (not is_parquet(path) or image_files(path)):
        options = {"--images": images, "--image-column": image_column}
        if given := [name for name, value in options.items() if value]:
            raise ValueError(f"{', '.join(given)} can't be followed: {source} is a folder")
        return read_folder(path, part, is_asked_for, caption_columns)
    columns, rows = read_table(path, part, is_asked_for=is_asked_for)
    left_out = list(getattr(rows, "left_out", ()))
    if isinstance(rows, ParquetRows) and path.is_dir():
        left_out += beside_parquet(path, rows.paths)
    return pairs_of_rows(
        path,
        columns,
        rows,
        folder=folder_of(path),
        images=images,
        image_column=image_column,
        caption_columns=caption_columns,
        left_out=left_out,
    )
