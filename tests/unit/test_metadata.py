"""What travels every step: small, picklable, and merged over ranks without losing a report."""

import pickle

from pillion.vllm.metadata import (
    CANCELLED,
    DONE,
    FAILED,
    NONE,
    JobReport,
    LoadPlan,
    PillionMetadata,
    PillionWorkerMetadata,
    SavePlan,
)

JOB = bytes(range(16))


def test_round_trip() -> None:
    load = LoadPlan(JOB, "req", b"l" * 16, b"n" * 32, [(0, 0, 3, 1), (1, 1, 0, 1)], b"h" * 64, [7, 9], 2000)
    save = SavePlan(JOB, b"n" * 32, [(0, b"", 1)], b"h" * 32, [4], 30_000)
    meta = pickle.loads(pickle.dumps(PillionMetadata([load], [save], ["gone"])))
    assert (meta.loads, meta.saves, meta.ended) == ((load,), (save,), ("gone",))
    assert isinstance(meta.loads[0], LoadPlan)


def test_an_idle_step_costs_a_few_bytes() -> None:
    assert len(pickle.dumps(PillionMetadata(), pickle.HIGHEST_PROTOCOL)) < 80


def test_one_ranks_failure_is_the_jobs() -> None:
    ours = PillionWorkerMetadata({JOB: JobReport(DONE, 1, 1, 8)})
    theirs = PillionWorkerMetadata({JOB: JobReport(FAILED, 1, 0, 0), b"x" * 16: JobReport(DONE, 1, 1, 2)})
    merged = ours.aggregate(theirs)
    assert merged.jobs[JOB] == JobReport(FAILED, 2, 1, 0)
    assert merged.jobs[b"x" * 16] == JobReport(DONE, 1, 1, 2)


def test_a_rank_that_only_quiesced_changes_no_outcome() -> None:
    ours = PillionWorkerMetadata({JOB: JobReport(NONE, 0, 1, 0)})
    merged = ours.aggregate(PillionWorkerMetadata({JOB: JobReport(DONE, 1, 0, 5)}))
    assert merged.jobs[JOB] == JobReport(DONE, 1, 1, 5)
    assert max(DONE, CANCELLED) != DONE


def test_refusals_and_disagreement_are_kept() -> None:
    merged = PillionWorkerMetadata(identity="a").aggregate(PillionWorkerMetadata(identity="a", refused="no"))
    assert merged.refused == "no"
    merged = PillionWorkerMetadata(identity="a").aggregate(PillionWorkerMetadata(identity="b"))
    assert merged.refused == "ranks disagree about the model"


def test_the_object_is_true_so_that_vllms_aggregator_keeps_it() -> None:
    assert bool(pickle.loads(pickle.dumps(PillionWorkerMetadata())))
