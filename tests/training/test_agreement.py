"""What processes must have in common; test_distill_processes.py runs it with real ones."""

import jax
import numpy as np

from tsdsr_jax.training.agreement import check_agreement, check_shared, content_of, differing_views


def test_only_what_differs_is_named_with_who_has_which():
    same = {"--seed": "0", "data": '"abc"'}
    views = [same | {"--learning_rate": rate} for rate in ("0.01", "0.0001", "0.01", "0.01", "0.01")]
    views[4] = views[4] | {"jax": '"0.10.2"'}
    assert differing_views(views) == [
        "--learning_rate: 0.01 in processes 0, 2 to 4; 0.0001 in process 1",
        "jax: nothing in processes 0 to 3; 0.10.2 in process 4",
    ]
    assert differing_views([same, same]) == []


def test_hashes_are_shortened():
    (line,) = differing_views([{"weights": f'"{digit * 64}"'} for digit in "ab"])
    assert line == "weights: aaaaaaaaaaaa… in process 0; bbbbbbbbbbbb… in process 1"


def test_a_single_process_agrees_and_shares_without_a_file(tmp_path):
    check_agreement({"anything": 1}, "flags")
    check_shared(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_contents_differ_where_a_value_a_shape_or_a_name_does(monkeypatch):
    tree = {"a": np.arange(4, dtype=np.float32), "b": {}}
    assert content_of(tree) == ""  # alone, nothing is hashed
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    others = [{"a": tree["a"] + [0, 0, 0, 1]}, {"a": tree["a"].reshape(2, 2)}, {"c": tree["a"]}, {}]
    hashes = {content_of(each) for each in (tree, *others)}
    assert len(hashes) == 5 and content_of(dict(tree)) in hashes
