"""What a job read and wrote, as OpenLineage names and describes it: sources, table versions, model folders.

    inputs(config, {"sources": [...]})                    what the last line of a job says it took
    outputs(config, {"table": {...}}, taken, written)     and gave

A table is its location, with the name in the catalog as a symlink.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app import tables
from app.catalog import catalog_properties
from app.config import Config
from app.errors import RayloopError, TableError
from app.openlineage_names import FILES, absolute, place, public
from app.snapshots import successor
from app.versions import TableVersion

if TYPE_CHECKING:
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.facet_v2 import DatasetFacet, InputDatasetFacet, OutputDatasetFacet
    from openlineage.client.generated.data_quality_metrics_dataset import ColumnMetrics
    from pyiceberg.table import Table
    from pyiceberg.table.snapshots import Snapshot

logger = logging.getLogger(__name__)

MAX_MANIFESTS = 32
"""Nulls are counted from a table's manifests, which takes milliseconds each: with more of them they are left out."""


@dataclass(frozen=True)
class Described:
    """A dataset and what is known of it."""

    namespace: str
    name: str
    facets: "dict[str, DatasetFacet]" = field(default_factory=dict)
    written: "dict[str, OutputDatasetFacet]" = field(default_factory=dict)
    """Of the commit that made this version."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """Place and version."""
        version = self.facets.get("version")
        return self.namespace, self.name, getattr(version, "datasetVersion", "")


def inputs(config: Config, taken: Any, rows_read: int | None = None) -> "list[InputDataset]":
    """The datasets of a job's inputs; `rows_read` is told where there is one source that it can be of."""
    from openlineage.client.event_v2 import InputDataset
    from openlineage.client.facet_v2 import input_statistics_input_dataset as statistics

    found = described(config, taken)
    read: dict[str, InputDatasetFacet] = {}
    if rows_read is not None and len(found) == 1:
        read["inputStatistics"] = statistics.InputStatisticsInputDatasetFacet(rowCount=rows_read)
    return [InputDataset(entry.namespace, entry.name, facets=entry.facets, inputFacets=read) for entry in found]


def outputs(config: Config, given: Any, taken: Any, rows_written: int | None = None) -> "list[OutputDataset]":
    """The datasets of a job's outputs that were not its inputs already.

    Args:
        config: Names the storage.
        given: The outputs as the last line has them.
        taken: The inputs as the last line has them.
        rows_written: Of the whole run, where the version's own commit is not all of it; 0: nothing was written.
    """
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

    known = {entry.identity for entry in described(config, taken)}
    made = []
    for entry in described(config, given):
        if entry.identity in known:
            continue
        written = entry.written
        if written and rows_written is not None:
            written = {"outputStatistics": statistics.OutputStatisticsOutputDatasetFacet(rowCount=rows_written)}
        made.append(OutputDataset(entry.namespace, entry.name, facets=entry.facets, outputFacets=written))
    return made


def described(config: Config, value: Any) -> list[Described]:
    """Every source, table version and model version in a part of a job's last line, each once."""
    found: dict[tuple[str, str, str], Described] = {}
    for entry in _walk(config, value):
        found.setdefault(entry.identity, entry)
    return list(found.values())


def _walk(config: Config, value: Any) -> Iterator[Described]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _walk(config, entry)
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("snapshot_id"), int) and "table" in value:
        yield _table(config, TableVersion(str(value["table"]), value["snapshot_id"]))
    elif isinstance(value.get("model"), str) and isinstance(value.get("uri"), str):
        yield _model(config, value)
    elif isinstance(value.get("uri"), str):
        yield _source(config, value)
    if isinstance(value.get("tables"), Mapping):  # jobs.maintain: table -> snapshot
        versions = [TableVersion(name, made) for name, made in value["tables"].items() if made and made > 0]
        yield from (_table(config, version) for version in versions)
    for nested in value.values():
        yield from _walk(config, nested)


def _source(config: Config, entry: Mapping[str, Any]) -> Described:
    from openlineage.client.facet_v2 import data_quality_metrics_dataset, dataset_version_dataset, datasource_dataset

    uri = entry["uri"]
    try:
        namespace, name = place(config, uri)
    except RayloopError as error:  # an Iceberg source whose table is gone: the job says so itself
        logger.warning("%s is described to OpenLineage by its name alone (%s)", uri, error)
        namespace, name = "rayloop", uri
    facets: dict[str, DatasetFacet] = {
        "dataSource": datasource_dataset.DatasourceDatasetFacet(name=namespace, uri=absolute(uri))
    }
    if "digest" in entry:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(str(entry["digest"]))
    if "bytes" in entry:
        facets["dataQualityMetrics"] = data_quality_metrics_dataset.DataQualityMetricsDatasetFacet(
            columnMetrics={},
            bytes=entry["bytes"],
            fileCount=entry.get("parts") if namespace.split(":")[0] in FILES else None,
        )
    return Described(namespace, name, facets)


def _model(config: Config, entry: Mapping[str, Any]) -> Described:
    from openlineage.client.facet_v2 import (
        dataset_type_dataset,
        dataset_version_dataset,
        datasource_dataset,
        symlinks_dataset,
    )

    namespace, name = place(config, entry["uri"])
    registered = symlinks_dataset.Identifier("mlflow", str(entry["model"]), "MODEL")
    return Described(
        namespace,
        name,
        {
            "version": dataset_version_dataset.DatasetVersionDatasetFacet(str(entry.get("version"))),
            "dataSource": datasource_dataset.DatasourceDatasetFacet(name=namespace, uri=absolute(entry["uri"])),
            "datasetType": dataset_type_dataset.DatasetTypeDatasetFacet("MODEL"),
            "symlinks": symlinks_dataset.SymlinksDatasetFacet([registered]),
        },
    )


def _table(config: Config, version: TableVersion) -> Described:
    """A table version; only its name where it cannot be looked at, which is no reason to stop a job."""
    try:
        return _looked_at(config, version)
    except (RayloopError, OSError) as error:
        logger.warning("%s is described to OpenLineage by its name alone (%s)", version, public(str(error)))
        return Described(public(catalog_properties(config.storage)["warehouse"]), version.table)


def _looked_at(config: Config, version: TableVersion) -> Described:
    from openlineage.client import facet_v2 as facet

    table = tables.open_table(config.storage, version.table)
    snapshot = table.snapshot_by_id(version.snapshot_id) or successor(table, version.snapshot_id)
    if snapshot is None or snapshot.summary is None:
        raise TableError(f"{version} does not exist")
    namespace, name = place(config, table.location())
    catalog = catalog_properties(config.storage)
    about = snapshot.summary
    columns = table.schemas()[snapshot.schema_id] if snapshot.schema_id is not None else table.schema()
    fields = [
        facet.schema_dataset.SchemaDatasetFacetFields(
            name=column.name, type=str(column.field_type), ordinal_position=at
        )
        for at, column in enumerate(columns.fields, 1)
    ]
    in_catalog = facet.symlinks_dataset.Identifier(public(catalog["uri"]), version.table, "TABLE")
    return Described(
        namespace,
        name,
        {
            "version": facet.dataset_version_dataset.DatasetVersionDatasetFacet(str(snapshot.snapshot_id)),
            "schema": facet.schema_dataset.SchemaDatasetFacet(fields),
            "dataSource": facet.datasource_dataset.DatasourceDatasetFacet(name=namespace, uri=table.location()),
            "datasetType": facet.dataset_type_dataset.DatasetTypeDatasetFacet("TABLE"),
            "storage": facet.storage_dataset.StorageDatasetFacet("iceberg", "parquet"),
            "symlinks": facet.symlinks_dataset.SymlinksDatasetFacet([in_catalog]),
            "catalog": facet.catalog_dataset.CatalogDatasetFacet(
                framework="iceberg", type=catalog["type"], name=catalog["name"], metadataUri=public(catalog["uri"]),
                warehouseUri=public(catalog["warehouse"]), source="rayloop",
            ),
            "dataQualityMetrics": facet.data_quality_metrics_dataset.DataQualityMetricsDatasetFacet(
                columnMetrics=_nulls(table, snapshot),
                rowCount=_number(about["total-records"]),
                bytes=_number(about["total-files-size"]),
                fileCount=_number(about["total-data-files"]),
            ),
        },
        {
            "outputStatistics": facet.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                rowCount=_number(about["added-records"]),
                size=_number(about["added-files-size"]),
                fileCount=_number(about["added-data-files"]),
            )
        },
    )  # fmt: skip


def _nulls(table: "Table", snapshot: "Snapshot") -> "dict[str, ColumnMetrics]":
    """Nulls in each column that is a plain value, by the statistics of the data files; empty if that is not cheap."""
    from openlineage.client.generated.data_quality_metrics_dataset import ColumnMetrics

    manifests = snapshot.manifests(table.io)
    if len(manifests) > MAX_MANIFESTS:
        return {}
    columns = {column.field_id: column.name for column in table.schema().fields if column.field_type.is_primitive}
    nulls = dict.fromkeys(columns.values(), 0)
    for manifest in manifests:
        for entry in manifest.fetch_manifest_entry(table.io):
            counted = entry.data_file.null_value_counts
            if not counted:
                return {}
            for identity, name in columns.items():  # a column that came later than the file is null in all of it
                nulls[name] += counted.get(identity, entry.data_file.record_count)
    return {name: ColumnMetrics(nullCount=count) for name, count in nulls.items()}


def _number(value: str | None) -> int:
    return int(value or 0)
