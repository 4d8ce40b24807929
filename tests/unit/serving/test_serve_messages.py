"""What crosses the border between the server and its engine arrives as it was sent."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.messages import Counters, Output, Step, TokenLogprob

LOGPROBS = st.builds(TokenLogprob, st.integers(), st.floats(-9, 0), st.just(((1, -0.5), (2, -1.0))), st.integers())
OUTPUTS = st.builds(
    Output,
    seq_id=st.integers(),
    text=st.text(),
    num_tokens=st.integers(),
    finish_reason=st.sampled_from([None, "stop"]),
    logprobs=st.none() | st.lists(LOGPROBS, max_size=2),
    prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=2),
    queue_s=st.none() | st.floats(0, 1),
    cached_tokens=st.integers(),
    cumulative_logprob=st.floats(-9, 0),
    embedding=st.none() | st.just((0.6, 0.8)),
)


@given(outputs=st.lists(OUTPUTS, max_size=4), running=st.integers(), used=st.floats(0, 1))
def test_a_step_arrives_as_it_was_sent(outputs: list[Output], running: int, used: float) -> None:
    step = Step(outputs, running, 1, used, Counters(aborts=2), 0.5, 0.25)
    arrived = pickle.loads(pickle.dumps(step))
    assert arrived == step
    assert [type(output) for output in arrived.outputs] == [Output] * len(outputs)
    assert type(arrived.counters) is Counters
