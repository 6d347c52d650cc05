"""What a run trains for, completed from its data."""

from app.cli.training.task_part import with_limit


def test_the_number_of_new_tokens_is_the_wanted_one_else_the_given_one_else_the_datas() -> None:
    said: list[str] = []

    def limit(given: dict[str, object], wanted: int | None = None) -> object:
        return with_limit(given, 8, spare=1.25, wanted=wanted, say=said.append)["defaults"]

    assert limit({}) == {"max_new_tokens": 10}
    assert limit({"defaults": {"max_new_tokens": 9, "stop": ["."]}}) == {"max_new_tokens": 9, "stop": ["."]}
    assert limit({"defaults": {"max_new_tokens": 9}}, 12) == {"max_new_tokens": 12}
    assert said == []
    assert limit({"defaults": {"max_new_tokens": 5}}) == {"max_new_tokens": 5}
    assert said == ["warning: max_new_tokens is 5, but answers have up to 8 tokens; longer are cut"]
