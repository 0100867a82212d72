"""reasoning-gym's records are reproducible, can be scored, and stay apart from held-out ones."""

import pytest

from chunkft.data.sources import load_records
from chunkft.data.tasks import ReasoningGymTask, questions
from chunkft.errors import InputError

SMALL = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&max_digits=1"


def test_records_are_conversational_prompt_completion() -> None:
    records = load_records("reasoning-gym:chain_sum", size=5, seed=3)
    assert len(records) == 5
    for record in records.to_list():
        (asked,), (said,) = record["prompt"], record["completion"]
        assert asked["role"] == "user"
        assert said["role"] == "assistant"
        assert said["content"].lstrip("-").isdigit()
    assert records.to_list() == load_records("reasoning-gym:chain_sum", size=5, seed=3).to_list()


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "countdown", "acre"])
def test_each_reference_answer_scores_full(name: str) -> None:
    """acre makes other items for another size: the record finds its entry all the same."""
    task = ReasoningGymTask(name)
    for record in task.records(6, seed=2).select([5, 2]).to_list():
        entry = task.entry(record)
        assert entry["question"] == record["prompt"][0]["content"]
        answer = record["completion"][0]["content"]
        assert task.score(record, answer) == task.score(entry, answer) == 1.0
        assert task.score(record, "no such answer") < 0.5
        assert task.score(record, None) < 0.5


def test_settings_from_the_query_and_from_config() -> None:
    task = ReasoningGymTask.parse("reasoning-gym:chain_sum?min_terms=2&allow_negation=true")
    assert task.settings == {"min_terms": 2, "allow_negation": True}
    again = ReasoningGymTask.parse("reasoning-gym:chain_sum?min_terms=3", {"min_terms": 4})
    assert again.settings == {"min_terms": 4}
    assert ReasoningGymTask.parse(repr(task)).settings == task.settings
    for record in load_records(SMALL, size=20).to_list():
        assert "digits" not in record
        expression = record["prompt"][0]["content"].split(":")[1]
        assert len(expression.split()) == 4  # a + b =


def test_neighbouring_seeds_share_nothing() -> None:
    """In reasoning-gym itself, item i of one seed is item i-1 of the next."""
    task = ReasoningGymTask("chain_sum", min_digits=4)
    zero, one = (set(questions(task.records(50, seed))) for seed in (0, 1))
    assert not zero & one
    task.records(2, seed=10**9)
    ReasoningGymTask("pool_matrix").records(2, seed=10**9)


def test_held_out_items_of_training_are_dropped_and_counted() -> None:
    task = ReasoningGymTask.parse(SMALL)
    training = task.records(60, seed=0)
    held_out, dropped = task.held_out(40, 0, training)
    assert dropped > 0
    assert len(held_out) == 40 - dropped
    assert not set(questions(held_out)) & set(questions(training))
    assert load_records(SMALL, split="test", size=40, exclude=training).to_list() == (
        held_out.to_list()
    )


def test_held_out_without_exclude_is_held_against_the_default_training_set() -> None:
    big = "reasoning-gym:chain_sum?min_digits=2&max_terms=2&max_digits=2"
    training = load_records(big)
    held_out = load_records(big, split="test")
    assert len(training) == 2000
    assert 100 < len(held_out) < 200
    assert not set(questions(held_out)) & set(questions(training))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("chainsum", r"chainsum: unknown task, \d+ are known; did you mean chain_sum"),
        ("", r": unknown task, \d+ are known; for example"),
        ("chain_sum?min_term=2", "no setting 'min_term'; did you mean min_terms.*it has"),
        ("chain_sum?min_terms=0", "refused by the task: min_terms must be positive"),
        ("chain_sum?min_terms=abc", "refused by the task"),
        ("chain_sum?size=3", "'size' is no setting of a task"),
        ("chain_sum?nonsense", "'nonsense' is not of the form <setting>=<value>"),
        ("graph_color", "item 0 has no reference answer"),
        ("composite", "refused by the task"),
    ],
)
def test_bad_tasks(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_records(f"reasoning-gym:{source}", size=1)
    assert "\n" not in str(caught.value)


def test_nothing_left_to_hold_out() -> None:
    source = SMALL + "&min_digits=1"
    training = load_records(source, size=2000)
    with pytest.raises(InputError, match=r"all 3 held-out questions .* occur among its 2000"):
        load_records(source, split="test", size=3, exclude=training)
    with pytest.raises(InputError, match="size 0 is below 1"):
        load_records(source, size=0)
    with pytest.raises(InputError, match="size 0 is below 1"):
        ReasoningGymTask("chain_sum").records(0)
