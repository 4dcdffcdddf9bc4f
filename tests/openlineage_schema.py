"""OpenLineage's schema, to validate events with.

The schema's own text is in no package. The client's classes are generated from it and name it (`_get_schema()`), so it
is rebuilt from those: types, required properties, the allowed event types, and the formats that their validators check.
Facets are looked up by their `_schemaURL`, and have to stand under the name that the specification gives them.
"""

import importlib
import pkgutil
import typing
import uuid
from collections.abc import Iterator
from datetime import datetime
from enum import EnumType
from types import NoneType, UnionType
from typing import Any
from urllib.parse import urlsplit

import attr
from jsonschema import Draft202012Validator, FormatChecker
from openlineage.client import generated
from openlineage.client.generated import base

FACETS = {
    "catalog": "CatalogDatasetFacet",
    "dataQualityMetrics": "DataQualityMetricsDatasetFacet",
    "dataSource": "DatasourceDatasetFacet",
    "datasetType": "DatasetTypeDatasetFacet",
    "errorMessage": "ErrorMessageRunFacet",
    "externalQuery": "ExternalQueryRunFacet",
    "inputStatistics": "InputStatisticsInputDatasetFacet",
    "jobType": "JobTypeJobFacet",
    "outputStatistics": "OutputStatisticsOutputDatasetFacet",
    "parent": "ParentRunFacet",
    "processing_engine": "ProcessingEngineRunFacet",
    "schema": "SchemaDatasetFacet",
    "storage": "StorageDatasetFacet",
    "symlinks": "SymlinksDatasetFacet",
    "tags": "TagsRunFacet",
    "version": "DatasetVersionDatasetFacet",
}
"""What the specification calls the facets that are sent."""
FORMATS = {"eventTime": "date-time", "runId": "uuid"} | dict.fromkeys(
    ("producer", "schemaURL", "_producer", "_schemaURL", "uri"), "uri"
)
ALWAYS = {"eventTime", "producer", "schemaURL", "_producer", "_schemaURL"}
"""Required by the specification; the classes fill them in."""
CHECKER = FormatChecker(formats=())


@CHECKER.checks("date-time", raises=ValueError)
def _date_time(value: object) -> bool:
    return "T" in str(value) and datetime.fromisoformat(str(value)).tzinfo is not None


@CHECKER.checks("uuid", raises=ValueError)
def _uuid(value: object) -> bool:
    return str(uuid.UUID(str(value))) == value


@CHECKER.checks("uri", raises=ValueError)
def _uri(value: object) -> bool:
    return bool(urlsplit(str(value)).scheme) and " " not in str(value)


def problems(event: Any) -> list[str]:
    """Where an event does not keep to the schema; empty if it does."""
    found = _checked(base.RunEvent, event)
    for where, name, facet in _facets(event):
        known = {entry.__name__: entry for entry in _classes()}.get(FACETS.get(name, ""))
        if known is None:
            found.append(f"{where}: no facet of the specification is called {name}")
        elif facet.get("_schemaURL") != known._get_schema():
            found.append(f"{where}.{name}: _schemaURL is {facet.get('_schemaURL')}, not {known._get_schema()}")
        else:
            found += [f"{where}.{name}: {problem}" for problem in _checked(known, facet)]
    return found


def _facets(event: Any) -> Iterator[tuple[str, str, Any]]:
    holders = [(part, event.get(part, {}), ("facets",)) for part in ("run", "job")]
    for side in ("input", "output"):
        for entry in event.get(f"{side}s", []):
            holders.append((f"{side} {entry.get('name')}", entry, ("facets", f"{side}Facets")))
    for where, holder, kinds in holders:
        for kind in kinds:
            for name, facet in holder.get(kind, {}).items():
                yield where, name, facet


def _checked(root: type, value: Any) -> list[str]:
    definitions: dict[str, Any] = {}
    schema = {**_schema(root, definitions), "$defs": definitions}
    errors = Draft202012Validator(schema, format_checker=CHECKER).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in errors]


def _classes() -> Iterator[type[Any]]:
    for module in pkgutil.iter_modules(generated.__path__):
        for value in vars(importlib.import_module(f"{generated.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, base.BaseFacet):
                yield value


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    plain = {str: "string", int: "integer", float: "number", bool: "boolean"}
    if kind in plain:
        return {"type": plain[kind]}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        # The client leaves out what is none: null itself is not allowed.
        return {"anyOf": [_schema(one, definitions) for one in arguments if one is not NoneType]}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if isinstance(kind, EnumType):
        return {"enum": [member.value for member in kind]}
    if not attr.has(kind):
        return {}
    name = f"{kind.__module__}.{kind.__name__}"
    if name not in definitions:
        definitions[name] = {}
        definitions[name] = _properties(kind, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _properties(kind: type[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    properties, required = dict[str, Any](), list[str]()
    for field in attr.fields(kind):
        properties[field.name] = _schema(hints[field.name], definitions)
        if field.name in FORMATS:
            properties[field.name] = {"type": "string", "format": FORMATS[field.name]}
        if field.default is attr.NOTHING or field.name in ALWAYS:
            required.append(field.name)
    return {"type": "object", "properties": properties, "required": required}
