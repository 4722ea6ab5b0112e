"""Every pair of states: the allowed moves happen, the others raise and change nothing."""

from collections.abc import Callable

import pytest

from tradecore.feed.states import Machine, State
from tradecore.snapshot import CONNECTION_STATES

MOVES: dict[State, Callable[[Machine], None]] = {
    State.SUBSCRIBING: Machine.subscribe,
    State.LIVE: Machine.go_live,
    State.STALE: Machine.go_stale,
    State.BACKING_OFF: Machine.back_off,
}
ALLOWED = {
    (State.CONNECTING, State.SUBSCRIBING),
    (State.CONNECTING, State.BACKING_OFF),
    (State.SUBSCRIBING, State.LIVE),
    (State.SUBSCRIBING, State.STALE),
    (State.SUBSCRIBING, State.BACKING_OFF),
    (State.LIVE, State.STALE),
    (State.LIVE, State.BACKING_OFF),
    (State.STALE, State.LIVE),
    (State.STALE, State.BACKING_OFF),
}


def machine_in(state: State) -> Machine:
    machine = Machine()
    machine.state = state
    return machine


@pytest.mark.parametrize("target", MOVES)
@pytest.mark.parametrize("state", State)
def test_moves(state: State, target: State) -> None:
    machine = machine_in(state)
    if (state, target) in ALLOWED:
        MOVES[target](machine)
        assert machine.state is target
    else:
        with pytest.raises(RuntimeError, match=f"from {state} to {target}"):
            MOVES[target](machine)
        assert machine.state is state


def test_a_new_attempt_begins_after_back_off_only() -> None:
    for state in State:
        machine = machine_in(state)
        if state in (State.CONNECTING, State.BACKING_OFF):
            machine.connect()
            assert machine.state is State.CONNECTING
        else:
            with pytest.raises(RuntimeError):
                machine.connect()


@pytest.mark.parametrize("state", State)
def test_a_closed_connection_cannot_be_revived(state: State) -> None:
    machine = machine_in(state)
    was_ending = machine.ending
    assert machine.drain() is not was_ending
    machine.close()
    assert machine.state is State.CLOSED
    machine.close()
    assert not machine.drain()
    for move in (Machine.connect, *MOVES.values()):
        with pytest.raises(RuntimeError):
            move(machine)
    assert machine.state is State.CLOSED


def test_names_are_those_of_metrics_and_health() -> None:
    assert tuple(State) == CONNECTION_STATES
