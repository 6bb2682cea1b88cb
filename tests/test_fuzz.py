"""Damaged files and nonsense: outcomes or clear errors, no traceback. `make soak` tries more."""

from tests import fuzz, fuzz_texts
from tests.fuzz import tried


def test_a_damaged_tar_gives_each_row_once_and_what_is_whole() -> None:
    tried(fuzz.tars_are_read, fuzz.TARS, examples=300)


def test_a_damaged_manifest_gives_each_row_once_and_what_is_whole() -> None:
    tried(fuzz.manifests_are_read, fuzz.MANIFESTS, examples=150)


def test_a_damaged_table_gives_each_row_once() -> None:
    tried(fuzz.tables_are_read, fuzz.TABLES, examples=100)


def test_rows_of_any_json_become_tables() -> None:
    tried(fuzz_texts.rows_become_tables, fuzz_texts.ROWS, examples=120)


def test_rows_of_any_json_become_prompts() -> None:
    tried(fuzz_texts.rows_become_prompts, fuzz_texts.ROWS, examples=40)


def test_any_spec_is_a_job_or_a_mistake() -> None:
    tried(fuzz_texts.specs_are_jobs_or_mistakes, fuzz_texts.SPECS, examples=300)


def test_any_spec_file_is_a_job_or_a_mistake() -> None:
    tried(fuzz_texts.files_are_jobs_or_mistakes, fuzz_texts.YAMLS, examples=150)


def test_any_condition_is_one_or_a_mistake_and_each_row_has_its_own_outcome() -> None:
    tried(fuzz_texts.conditions_hold_or_not, fuzz_texts.CONDITIONS, examples=400)
