"""What operations do that are about keys, whatever these hold: deleting, expiring, naming and moving them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engram.effects import Effect, State, Touched, touch_key, touch_keys
from engram.operations import (
    CopyKey,
    DeleteKeys,
    ExchangeDatabases,
    Flush,
    MoveKey,
    Operation,
    RenameKey,
    SetExpiry,
)

# Where a table may have to grow, that comes first: it is done as a whole or not at all.


def _delete_keys(state: State, lsn: int, operation: DeleteKeys, prepared: None) -> None:
    keyspace = state.keyspaces[operation.database]
    for key in operation.keys:
        state.drop(operation.database, keyspace.delete(key))


def _set_expiry(state: State, lsn: int, operation: SetExpiry, prepared: None) -> None:
    state.keyspaces[operation.database].set_expiry(operation.key, operation.expires_at)


def _flush(state: State, lsn: int, operation: Flush, prepared: None) -> None:
    state.flush(list(state.keyspaces) if operation.database is None else (operation.database,))


def _rename_key(state: State, lsn: int, operation: RenameKey, prepared: None) -> None:
    if operation.source != operation.destination:
        keyspace = state.keyspaces[operation.database]
        replaced = keyspace.values.get(operation.destination)
        keyspace.rename(operation.source, operation.destination)
        state.drop(operation.database, replaced)


def _copied(state: State, lsn: int, operation: CopyKey) -> Any:
    return state.copy_of(state.keyspaces[operation.database].values[operation.source])


def _copy_key(state: State, lsn: int, operation: CopyKey, value: Any) -> None:
    expires_at = state.keyspaces[operation.database].expiries.get(operation.source)
    state.place(operation.destination_database, operation.destination, value, expires_at)


def _move_key(state: State, lsn: int, operation: MoveKey, prepared: None) -> None:
    source, destination = (
        state.keyspaces[number] for number in (operation.database, operation.destination_database)
    )
    destination.set(operation.key, source.values[operation.key], source.expiries.get(operation.key))
    source.delete(operation.key)


def _exchange_databases(state: State, lsn: int, operation: ExchangeDatabases, prepared: None) -> None:
    if operation.first != operation.second:
        state.keyspaces[operation.first].exchange(state.keyspaces[operation.second])


def _touch_both(operation: RenameKey) -> Touched:
    return Touched(((operation.database, (operation.source, operation.destination)),))


def _touch_copy(operation: CopyKey) -> Touched:
    return Touched(((operation.destination_database, (operation.destination,)),))


def _touch_moved(operation: MoveKey) -> Touched:
    keys = (operation.key,)
    return Touched(((operation.database, keys), (operation.destination_database, keys)))


def _touch_flushed(operation: Flush) -> Touched:
    return Touched(databases=None if operation.database is None else (operation.database,))


def _touch_exchanged(operation: ExchangeDatabases) -> Touched:
    return Touched(databases=(operation.first, operation.second))


EFFECTS: Mapping[type[Operation], Effect] = {
    DeleteKeys: Effect(_delete_keys, touch_keys),
    SetExpiry: Effect(_set_expiry, touch_key),
    Flush: Effect(_flush, _touch_flushed),
    RenameKey: Effect(_rename_key, _touch_both),
    CopyKey: Effect(_copy_key, _touch_copy, _copied),
    MoveKey: Effect(_move_key, _touch_moved),
    ExchangeDatabases: Effect(_exchange_databases, _touch_exchanged),
}
