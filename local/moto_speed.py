"""What moto does slowly: some of it would cost more with every job of a system that runs for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from moto import backends
from moto.core.serialize import ResponseSerializer
from moto.dynamodb.models import DynamoDBBackend
from moto.dynamodb.models.table import Table
from moto.dynamodb.parsing.ast_nodes import DepthFirstTraverser  # type: ignore[attr-defined]


def make_fast() -> None:
    """Have moto of this process answer sooner, and the thousandth call as soon as the first."""
    # It lists the folder of its modules for every request.
    modules = tuple(backends.list_of_moto_modules())
    backends.list_of_moto_modules = lambda: modules
    for owner, name, better in (
        # It copies the whole table for every write of a transaction, in case the transaction fails. Instead, what the
        # transaction touches is kept.
        (Table, "__deepcopy__", lambda table, _memo: table),
        (DynamoDBBackend, "transact_write_items", _undone_on_failure(DynamoDBBackend.transact_write_items)),
        # It looks for each member of an answer under all the names that it may have in a Python object, for every
        # attribute of every item. DynamoDB's answers are dicts with AWS's own names.
        (ResponseSerializer, "get_value", _own_names_in_dynamodb(ResponseSerializer.get_value)),
        # It makes this tuple anew for every node of every expression.
        (DepthFirstTraverser, "nodes_to_be_processed", _once_a_class(DepthFirstTraverser.nodes_to_be_processed)),
    ):
        setattr(owner, name, better)


def _own_names_in_dynamodb(original: Any) -> Any:
    def get_value(serializer: Any, value: Any, key: str, shape: Any) -> Any:
        if type(value) is dict and serializer.operation_model.service_model.service_name == "dynamodb":
            return value.get(key)
        return original(serializer, value, key, shape)

    return get_value


def _once_a_class(original: Any) -> Any:
    known: dict[type, Any] = {}

    def nodes_to_be_processed(traverser: Any) -> Any:
        kind = type(traverser)
        if kind not in known:
            known[kind] = original(traverser)
        return known[kind]

    return nodes_to_be_processed


def _undone_on_failure(original: Any) -> Any:
    def transact_write_items(backend: Any, transact_items: list[dict[str, Any]]) -> None:
        before = [
            (table, *keys, copy.deepcopy(table.get_item(*keys))) for table, keys in _touched(backend, transact_items)
        ]
        try:
            original(backend, transact_items)
        except Exception:
            for table, hash_key, range_key, item in before:
                if item is None:
                    table.delete_item(hash_key, range_key)
                elif range_key is None:
                    table.items[hash_key] = item
                else:
                    table.items[hash_key][range_key] = item
            raise

    return transact_write_items


def _touched(backend: Any, transact_items: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    for write in transact_items:
        for operation in write.values():
            if table := backend.tables.get(operation.get("TableName")):
                yield table, backend.get_keys_value(table, operation.get("Key") or operation["Item"])
