from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fraqtl_serve.reports.report import KVReport, KVUsage, Ledger
from tests.serve.fake_engine import account

FIELDS = {
    "version",
    "kv_format",
    "tokens",
    "blocks",
    "block_size",
    "shared_blocks",
    "loaded_blocks",
    "bytes",
    "baseline_bytes",
    "saved_bytes",
    "state_bytes",
    "ratio",
}


def report_of(ledger: Ledger) -> KVReport:
    report = ledger.report()
    assert report is not None
    return report


def test_one_sequence() -> None:
    ledger = Ledger("k4v4", accounts={"a": account([7, 3], tokens=20)})
    assert report_of(ledger).model_dump() == {
        "version": 1,
        "kv_format": "k4v4",
        "tokens": 20,
        "blocks": 2,
        "block_size": 16,
        "shared_blocks": 0,
        "loaded_blocks": 0,
        "bytes": 4352,
        "baseline_bytes": 16384,
        "saved_bytes": 12032,
        "state_bytes": 0,
        "ratio": 3.7647,
    }


def test_sequences_share_blocks_of_their_prompt_once() -> None:
    accounts = {
        "0_a": account([1, 2, 5], tokens=40),
        "1_a": account([1, 2, 6], tokens=41),
        "2_a": account([1, 2, 7, 8], tokens=52),
    }
    report = report_of(Ledger("k4v4", accounts=accounts))
    assert report.blocks == 6  # 1, 2, 5, 6, 7, 8
    assert report.tokens == 133
    assert (report.bytes, report.baseline_bytes) == (13056, 49152)


def test_engines_beside_each_other_number_their_blocks_alike() -> None:
    accounts = {
        "a": account([1, 2], engine=0),
        "b": account([1, 2], engine=1, shared=([1, 2],)),
        "c": account([2, 3], engine=1, shared=([2],)),
    }
    report = report_of(Ledger("k4v4", accounts=accounts))
    assert (report.blocks, report.shared_blocks) == (5, 2)


def test_report_over_one_of_the_sequences() -> None:
    ledger = Ledger("k4v4", accounts={"a": account([1, 2], tokens=18), "b": account([2, 3, 4], tokens=40)})
    one = ledger.report_of(["b", "unknown"])
    assert one is not None and (one.tokens, one.blocks) == (40, 3)
    assert ledger.report_of(["unknown"]) is None


def test_prompts_without_common_blocks_add_up() -> None:
    accounts = {"a": account([1, 2], tokens=18), "b": account([3], tokens=9)}
    report = report_of(Ledger("k4v4", accounts=accounts))
    assert (report.blocks, report.tokens, report.bytes) == (3, 27, 6528)


def test_blocks_found_in_the_prefix_cache() -> None:
    ledger = Ledger("k4v4", accounts={"a": account([9, 4, 6, 2], shared=([9, 4],))})
    assert report_of(ledger).shared_blocks == 2


def test_a_cached_block_counts_once_for_all_sequences() -> None:
    accounts = {
        "0_a": account([1, 2, 5], shared=([1],)),
        "1_a": account([1, 2, 6], shared=([1, 2],)),
        "b": account([1, 9], shared=([1],)),
    }
    report = report_of(Ledger("k4v4", accounts=accounts))
    assert (report.blocks, report.shared_blocks) == (5, 2)


def test_groups_have_their_own_bytes_and_block_sizes() -> None:
    said = account(
        [1, 2, 3],
        [8],
        block_size=(16, 64),
        block_bytes=(100, 1000),
        baseline_block_bytes=(400, 2000),
        shared=([1, 2, 3], [8]),
        loaded=([3], [8]),
    )
    report = report_of(Ledger("k8v8", accounts={"a": said}))
    assert report.model_dump() == {
        "version": 1,
        "kv_format": "k8v8",
        "tokens": 20,
        "blocks": 4,
        "block_size": 16,
        "shared_blocks": 4,
        "loaded_blocks": 2,
        "bytes": 1300,
        "baseline_bytes": 3200,
        "saved_bytes": 1900,
        "state_bytes": 0,
        "ratio": 2.4615,
    }


def test_states_of_a_hybrid_model_are_counted_apart() -> None:
    """Their group comes first, as its layers do; without prefix caching it has one block as long as the context."""
    sizes: dict[str, Any] = {"block_size": (8192, 96), "block_bytes": (0, 100), "baseline_block_bytes": (0, 380)}
    sizes |= {"state_block_bytes": (110, 0)}
    said = {"a": account([4, 9], [1, 2, 3], **sizes), "b": account([5, 9], [1, 2, 6], **sizes)}
    report = report_of(Ledger("k4v4", accounts=said))
    assert (report.blocks, report.block_size, report.state_bytes) == (7, 96, 330)
    assert (report.bytes, report.baseline_bytes, report.saved_bytes, report.ratio) == (400, 1520, 1120, 3.8)


def test_equal_block_numbers_of_two_groups_are_two_blocks() -> None:
    said = account([1], [1], block_size=(16, 16), block_bytes=(10, 20), baseline_block_bytes=(40, 80))
    report = report_of(Ledger("k4v4", accounts={"a": said}))
    assert (report.blocks, report.bytes) == (2, 30)


def test_no_account_no_report() -> None:
    assert Ledger("k4v4", sequences=2).report() is None


def test_a_request_that_held_nothing() -> None:
    report = report_of(Ledger("k4v4", accounts={"a": account([], tokens=0)}))
    assert (report.blocks, report.bytes, report.saved_bytes, report.ratio) == (0, 0, 0, 1.0)


def test_object_has_the_promised_fields_and_no_others() -> None:
    report = report_of(Ledger("k4v4", accounts={"a": account([1])}))
    assert set(report.model_dump()) == FIELDS
    assert set(KVReport.model_json_schema()["properties"]) == FIELDS


def test_usage_holds_integers_that_add_up() -> None:
    usage = report_of(Ledger("k4v4", accounts={"a": account([1])})).usage()
    assert usage == {
        "tokens": 20,
        "blocks": 1,
        "shared_blocks": 0,
        "loaded_blocks": 0,
        "bytes": 2176,
        "baseline_bytes": 8192,
        "saved_bytes": 6016,
        "state_bytes": 0,
    }
    assert all(type(value) is int for value in usage.values())


def test_json_round_trip() -> None:
    report = report_of(Ledger("k4v4", accounts={"a": account([1, 2], shared=([1],))}))
    assert KVReport.model_validate_json(report.model_dump_json()) == report
    assert KVUsage.model_validate(report.usage()).model_dump() == report.usage()


def test_another_version_is_not_ours() -> None:
    report = report_of(Ledger("k4v4", accounts={"a": account([1])}))
    with pytest.raises(ValidationError, match="version"):
        KVReport.model_validate({**report.model_dump(), "version": 2})
