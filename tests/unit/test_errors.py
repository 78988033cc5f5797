"""The error tree is the public one, and errors with problems travel between processes whole."""

from __future__ import annotations

import copy
import pickle

from valohai_dagster import errors


def test_exported_names_are_all_errors_of_the_tree() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(errors.__all__) == defined
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.ValohaiError)
        assert name in (errors.__doc__ or "") or name == "ProblemsError"


def test_problems_are_listed_in_the_message_and_survive_pickling() -> None:
    error = errors.SpecError("step 'train' is not valid", ["a: x", "b: y"])
    assert str(error) == "step 'train' is not valid\n  - a: x\n  - b: y"
    assert pickle.loads(pickle.dumps(error)).problems == ("a: x", "b: y")
    assert copy.copy(errors.StoreFull("full", store="s")).store == "s"
