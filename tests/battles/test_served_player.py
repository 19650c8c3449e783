"""The player behind a server: how answers become scores, and whole battles with a server that plays one action."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import Reply, ServerError, Token
from tests.battles.simulated import make_specs, play
from tests.processes import free_port

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.players.scripted import RandomBattlePlayer
from pokegemma.battles.players.served import ServedPlayer, score_reply

FORMAT = "gen1randombattle"


def reply(*tokens: Token, text: str = "") -> Reply:
    return Reply(text or "".join(token.text for token in tokens), True, 0.0, tokens)


def test_one_token_an_action_is_scored_by_the_likeliest_tokens() -> None:
    scores = score_reply(reply(Token(" <4>", -0.1, ((" <4>", -0.1), (" <11>", -2.5), ("word", -3.0)))))
    assert scores[4] == -0.1 and scores[11] == -2.5
    assert np.isneginf(np.delete(scores, [4, 11])).all()


def test_an_action_of_several_tokens_is_scored_where_it_leaves_the_answer() -> None:
    """The answer is <1>; <10> leaves it at the third token, <7> at the second."""
    scores = score_reply(
        reply(
            Token(" <", -0.25, ((" <", -0.25),)),
            Token("1", -0.5, (("1", -0.5), ("7", -1.0))),
            Token(">", -0.125, ((">", -0.125), ("0", -2.0))),
        )
    )
    assert scores[1] == -0.25 - 0.5 - 0.125
    assert scores[10] == -0.25 - 0.5 - 2.0
    assert scores[7] == -0.25 - 1.0
    assert np.isneginf(scores[[0, 2, 11, 12]]).all()


def test_a_token_that_all_actions_begin_with_names_none_of_them() -> None:
    scores = score_reply(reply(Token("I", -0.1, (("I", -0.1), (" <", -3.0), ("The", -4.0)))))
    assert np.isneginf(scores).all()


@pytest.mark.parametrize(("text", "action"), [(" <12>", 12), ("<0> and so on", 0), ("I use Surf", None), ("", None)])
def test_an_answer_without_probabilities_is_read(text: str, action: int | None) -> None:
    scores = score_reply(Reply(text, True, 0.0))
    assert [number for number in range(13) if not np.isneginf(scores[number])] == ([] if action is None else [action])


class Handler(BaseHTTPRequestHandler):
    """Answers every question with <0>, and <4> as the second likeliest; or with words."""

    def do_GET(self) -> None:
        self.answer({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.prompts.append(body["messages"][0]["content"][0]["text"])
        choice = {"message": {"content": self.server.text}, "finish_reason": "length"}
        if self.server.with_probabilities:
            likeliest = [{"token": "<0>", "logprob": -0.5}, {"token": "<4>", "logprob": -1.5}]
            choice["logprobs"] = {"content": [{"token": "<0>", "logprob": -0.5, "top_logprobs": likeliest}]}
        self.answer({"choices": [choice]})

    def answer(self, data: dict) -> None:
        content = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def served(
    text: str = "<0>", *, with_probabilities: bool = True, models: tuple[str, ...] = ("policy",)
) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.text, server.with_probabilities, server.models, server.prompts = text, with_probabilities, models, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_plays_whole_battles_legally(simulator) -> None:
    """The first move where there is one, else the first switch: <0> is illegal after a Pokémon has fainted."""
    with served() as server:
        player = ServedPlayer("policy", server.url)
        (result,) = play(simulator, make_specs(1), (player, RandomBattlePlayer())).values()
    assert result.problem == "" and result.winner is not None
    actions = [step.action for step in result.seats[0].steps]
    assert len(server.prompts) == len(actions) and {0, 4} <= set(actions) <= {0, 1, 2, 3, 4}
    assert all(prompt.startswith(f"{FORMAT} ") and prompt.endswith(" action") for prompt in server.prompts)
    assert result.seats[0].num_unanswered == 0


def test_words_that_are_no_action_are_counted(simulator) -> None:
    with served("I use Surf", with_probabilities=False) as server:
        player = ServedPlayer("policy", server.url)
        (result,) = play(simulator, make_specs(1), (player, RandomBattlePlayer()), max_turns=3).values()
    assert result.problem == "" and result.seats[0].num_unanswered == len(server.prompts) > 0
    assert result.seats[1].num_unanswered == 0


def test_the_url_of_a_server_is_a_player() -> None:
    source = PlayerSource.parse("new=http://127.0.0.1:8000")
    assert (source.name, source.is_served, source.fingerprint()) == ("new", True, "http://127.0.0.1:8000")
    with pytest.raises(PokegemmaError, match="temperature"):
        PlayerSource.parse("new=http://127.0.0.1:8000@0.5")
    with served() as server:
        assert PlayerSource.parse(f"new={server.url}").open().name == "new"


def test_a_served_policy_may_read_the_87_words(simulator) -> None:
    with served() as server:
        player = PlayerSource.parse(f"new={server.url}#words").open()
        play(simulator, make_specs(1), (player, RandomBattlePlayer()), max_turns=2)
    assert all(len(prompt.split()) == 88 and prompt.startswith(f"<{FORMAT}> ") for prompt in server.prompts)
    with pytest.raises(PokegemmaError, match="#pictures must be one of #short, #words"):
        PlayerSource.parse("new=http://127.0.0.1:8000#pictures")


def test_a_server_of_several_models_is_refused() -> None:
    with served(models=("one", "two")) as server, pytest.raises(PokegemmaError, match="one, two"):
        ServedPlayer("policy", server.url)


def test_a_server_that_is_not_there_is_one_line() -> None:
    port = free_port()
    with pytest.raises(ServerError, match=f"127.0.0.1:{port}"):
        ServedPlayer("policy", f"http://127.0.0.1:{port}", timeout_s=5)
