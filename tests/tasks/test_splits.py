"""Which rows train, choose and score: sizes, seeds, what is carved, and what a missing split becomes."""

from __future__ import annotations

import pytest
import tiny

from zotune.errors import InputError
from zotune.tasks import get_task
from zotune.tasks.splits import Source, find_source, scored_rows, training_splits
from zotune.tasks.task import Task

TASK = Task(name="t", prompt="{text} It was", words={"0": "bad", "1": "good"})


def draw(source, seed=0, train=1000, validation=500, test=1000):
    return training_splits(TASK, source, train_size=train, validation_size=validation, test_size=test, seed=seed)


def places(examples) -> list[str]:
    return [example.where for example in examples]


@pytest.fixture
def whole(tmp_path) -> Source:
    return find_source(TASK, str(tiny.save_data(tmp_path / "whole")), None)


def test_each_split_is_drawn_without_repeats_up_to_its_size(whole):
    splits = draw(whole, train=13, validation=7, test=11)
    for part, size in ((splits.train, 13), (splits.validation, 7), (splits.test, 11)):
        assert len(set(places(part))) == len(part) == size
    all_of_it = draw(whole)
    assert [len(p) for p in (all_of_it.train, all_of_it.validation, all_of_it.test)] == [60, 20, 30]
    assert all_of_it.test_split == "test"


def test_another_seed_draws_other_rows_to_train_on_and_the_same_to_test_on(whole):
    a, again, b = (draw(whole, seed, 13, 7, 11) for seed in (1, 1, 2))
    assert places(a.train) == places(again.train) != places(b.train)
    assert set(places(a.train)) != set(places(b.train))
    assert places(a.validation) == places(again.validation) != places(b.validation)
    assert places(a.test) == places(again.test) == places(b.test)


def test_a_missing_validation_split_is_carved_from_train_at_most_a_fifth_and_shares_no_row(tmp_path):
    source = Source(folder=tiny.save_data(tmp_path, train=50, test=10))
    a, b = draw(source, seed=1), draw(source, seed=2)
    assert (len(a.train), len(a.validation), len(a.test)) == (40, 10, 10)
    assert not set(places(a.train)) & set(places(a.validation))
    assert places(a.validation) != places(b.validation)
    assert len(draw(source, validation=3).validation) == 3
    assert len(draw(source, validation=3).train) == 47


def test_without_a_test_split_validation_is_scored_and_says_so(tmp_path):
    splits = draw(Source(folder=tiny.save_data(tmp_path, train=50, validation=10)))
    assert splits.test_split == "validation"
    assert places(splits.test) == places(splits.validation)


def test_one_file_is_train_and_its_carved_validation(tmp_path):
    file = tiny.write_rows(tmp_path / "all.jsonl", tiny.text_rows(50))
    source = find_source(TASK, str(file), None)
    splits = draw(source)
    assert (len(splits.train), len(splits.validation), splits.test_split) == (40, 10, "validation")
    rows, split = scored_rows(source, 1000)
    assert (len(rows), split) == (50, "file")


@pytest.mark.parametrize("sizes", [{"train": 50, "validation": 20}, {"train": 50}], ids=["validation", "carved"])
@pytest.mark.parametrize(("seed", "size"), [(0, None), (3, 6)])
def test_eval_scores_the_rows_that_the_run_scored(tmp_path, sizes, seed, size):
    source = Source(folder=tiny.save_data(tmp_path, **sizes))
    run = draw(source, seed, validation=size or 500, test=size or 1000)
    rows, split = scored_rows(source, size, seed=seed)
    assert split == "validation"
    assert places(rows) == places(run.test)


def test_eval_scores_the_test_split_whatever_the_seed_and_predict_takes_rows_in_order(whole):
    for seed in (0, 5):
        rows, split = scored_rows(whole, 11, seed=seed)
        assert split == "test"
        assert places(rows) == places(draw(whole, seed, test=11).test)
    rows, _ = scored_rows(whole, 11, in_order=True)
    assert [row.where.rsplit(":", 1)[1] for row in rows] == [str(i) for i in range(1, 12)]


def test_data_dir_holds_a_folder_a_task(tmp_path):
    tiny.save_data(tmp_path / "sst2")
    assert find_source(get_task("sst2"), None, str(tmp_path)).folder == tmp_path / "sst2"
    with pytest.raises(InputError, match="no folder 'sst2' in it"):
        find_source(get_task("sst2"), None, str(tmp_path / "sst2"))


def test_a_builtin_task_comes_from_the_hub_and_chooses_on_nothing_that_it_scores():
    source = find_source(get_task("sst2"), None, None)
    assert source.hub == ("nyu-mll/glue", "sst2", "validation")
    assert source.rows("validation") is None
    assert find_source(TASK, "someone/texts", None).hub == ("someone/texts", None, "test")


def test_a_missing_path_suggests_the_nearest_name(tmp_path):
    (tmp_path / "reviews").mkdir()
    with pytest.raises(InputError, match="no such file or folder; did you mean 'reviews'"):
        find_source(TASK, str(tmp_path / "review"), None)


def test_what_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no train\.jsonl, train\.csv or train\.parquet in it"):
        draw(Source(folder=tiny.save_data(tmp_path / "a", validation=3)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.csv").write_text("text,label\n")
    with pytest.raises(InputError, match=r"train\.csv: no rows in it"):
        draw(Source(folder=tmp_path / "b"))
    with pytest.raises(InputError, match="one training row, and no validation split"):
        draw(Source(folder=tiny.save_data(tmp_path / "c", train=1)))
    empty = tiny.save_data(tmp_path / "d")
    (empty / "test.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"test\.jsonl: no rows in it"):
        draw(Source(folder=empty))
    (tmp_path / "e").mkdir()
    with pytest.raises(InputError, match="split in it"):
        scored_rows(Source(folder=tmp_path / "e"), 5)
