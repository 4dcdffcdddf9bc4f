"""`ingestion`: sources, rules and what is done with a record on its way into a table version."""

import re
from collections import Counter
from typing import Any, Literal, get_args

from pydantic import model_validator

from app.settings.section import Count, Fraction, Natural, NotNegative, Positive, Section
from app.versions import digest

SourceFormat = Literal[
    "jsonl", "parquet", "csv", "arrow", "avro", "text", "sql", "iceberg", "kafka", "traffic", "sample"
]
FILE_FORMATS = ("jsonl", "parquet", "csv", "arrow", "avro", "text")

Severity = Literal["drop", "quarantine", "warn", "stop"]
UnreadableRule = Literal[
    "invalid_encoding",  # bytes that are not UTF-8, or half of a surrogate pair
    "invalid_json",  # cannot be parsed
    "invalid_csv",  # a quote in the wrong place
    "wrong_column_count",  # more or fewer fields than the header
    "too_long_record",  # more than 16 MB
    "null_value",  # a Kafka message without a value
    "not_a_record",  # JSON, but not an object
    "missing_conversation_id",  # the source has ids, this record has none
    "missing_messages",  # none at all
    "invalid_messages",  # not a list of {role, content, intent?} of strings
    "missing_role",
    "unknown_role",
    "empty_content",  # nothing but white space
]
"""What leaves no conversation to accept: these cannot be warnings."""
DoubtfulRule = Literal[
    "roles_do_not_alternate",  # not [system,] user, assistant, user, ...
    "too_long_message",
    "too_many_messages",
    "unknown_channel",  # a warning takes it as `unknown`
    "unknown_language",  # a warning takes it as missing
    "unknown_intent",  # not in `intents`; a warning takes the label away
    "invalid_language",  # not a string
    "invalid_timestamp",  # not ISO 8601, before 1970 or in the future; a warning takes it as missing
    "timestamps_out_of_order",  # a message is older than the one before it
    "unexpected_column",  # a value in a column that the source's mapping does not name
    "mojibake",  # text once decoded with the wrong character set; a warning repairs it
    "anomaly",  # unlike the accepted history
    "contradictory_label",  # the text of an earlier conversation with another intent
    "near_duplicate",  # nearly the text of another conversation
    "duplicate_conversation_id",  # the id of another conversation with another text
]
"""What is a matter of taste: the record can be accepted all the same."""
RuleName = UnreadableRule | DoubtfulRule
RULES: tuple[str, ...] = (*get_args(UnreadableRule), *get_args(DoubtfulRule))


class ColumnsConfig(Section):
    """How a source's columns become a conversation record. Columns a source lacks are taken as empty."""

    conversation_id: str = "conversation_id"
    """Column with the conversation's id; where a source has none, one is made from source and position."""
    messages: str = "messages"
    """Column with the list of {role, content, intent?}; not read when `user` is given."""
    user: str | None = None
    """For one-turn tables: column with the customer's text."""
    assistant: str | None = None
    """For one-turn tables: the reply, as a column name or a template such as 'This is about {category}.'"""
    intent: str = "intent"
    """Column with the label of a one-turn table."""
    channel: str = "channel"
    """Column with the channel the conversation came through."""
    language: str = "language"
    """Column with the language."""
    started_at: str = "started_at"
    """Column with the time of the first message, ISO 8601."""
    ignored: tuple[str, ...] = ()
    """Other columns that are known and not needed; `*` for whatever there is. See rule `unexpected_column`."""


class SourceConfig(Section):
    """One place conversations come from. Addresses and secrets of servers come from the environment."""

    uri: str
    """Files: a file, a folder or a glob, local (relative to RAYLOOP_HOME) or on s3://, gs://, abfs://, hdfs://.
    kafka://host:port,host:port/topic; postgresql+psycopg://user@host/database and the like; iceberg:namespace.table;
    traffic: for this product's own log; sample:shop."""
    format: SourceFormat
    """How it is written. Files may be compressed (.gz, .zst); sample is the embedded shop."""
    name: str | None = None
    """What provenance and committed offsets call it, so that servers may move; none: its URI."""
    columns: ColumnsConfig = ColumnsConfig()
    """Mapping from its columns to the conversation record."""
    query: str | None = None
    """sql: one SELECT, in an order that does not change."""
    cursor_column: str | None = None
    """sql: a column of the query that only grows; a later ingest reads the rows above the last value it saw."""
    snapshot_id: int | None = None
    """iceberg: the snapshot to read; none: the newest."""
    start: Literal["earliest", "latest"] = "earliest"
    """kafka: where a partition is begun that nothing has been committed for."""
    accept_lost_offsets: bool = False
    """kafka: go on from the log start where committed offsets are older than it; otherwise the stage stops."""
    timeout_s: Positive = 60.0
    """kafka, sql: how long the server may keep silent."""
    settle_s: NotNegative = 600.0
    """traffic: how long a conversation has to be silent before it is read: it might go on, or be judged by feedback,
    of which nothing is seen later."""

    @model_validator(mode="after")
    def _complete(self) -> "SourceConfig":
        if re.search(r"://[^/@]*:[^/@]*@", self.uri):
            raise ValueError("a source's uri holds no password, since settings are kept and shown: see its environment")
        scheme = {"kafka": "kafka://", "iceberg": "iceberg:", "traffic": "traffic:", "sample": "sample:"}
        if not self.uri.startswith(scheme.get(self.format, "")):
            raise ValueError(f"a {self.format} source's uri begins with {scheme[self.format]}, got {self.uri!r}")
        if self.format == "kafka" and self.uri.removeprefix("kafka://").count("/") != 1:
            raise ValueError(f"write a Kafka source as kafka://host:port,host:port/topic, got {self.uri!r}")
        if (self.format == "sql") != (self.query is not None):
            raise ValueError("`query` belongs to a source of format sql, and such a source needs one")
        return self

    @property
    def identity(self) -> str:
        """What provenance, committed offsets and cursors call it."""
        return self.name or (f"{self.uri}#{digest(self.query)[:8]}" if self.query else self.uri)


class SampleConfig(Section):
    """The embedded shop: an endless, deterministic generator of conversations with planted defects."""

    conversations: Count = 20_000
    """How many to generate."""
    seed: int = 7
    """Same seed, same bytes."""
    defect_fraction: Fraction = 0.05
    """Share of records with a planted defect."""


class RuleConfig(Section):
    """What becomes of a record that breaks a rule, and when that stops the stage."""

    severity: Severity = "quarantine"
    """drop: counted and gone. quarantine: kept aside with its reason. warn: accepted, counted. stop: kept aside,
    and the stage stops."""
    max_fraction: Fraction | None = None
    """A larger share of records that break the rule stops the stage, and nothing becomes a version; none: 0 for
    severity stop, else no limit."""

    @property
    def limit(self) -> float:
        """The share above which the stage stops."""
        if self.max_fraction is not None:
            return self.max_fraction
        return 0.0 if self.severity == "stop" else 1.0


class CheckConfig(Section):
    """A rule of your own: a pandera check on a column of the accepted conversations."""

    column: Literal["conversation_id", "channel", "language", "started_at", "intent", "turns", "chars", "text"]
    """turns: messages; text: all messages, a line each; chars: its characters."""
    check: str
    """Name of a pandera check: isin, notin, str_matches, str_contains, str_length, in_range, ge, gt, le, lt, ..."""
    arguments: dict[str, Any] = {}
    """The check's own arguments, e.g. {min_value: 2, max_value: 40}."""
    name: str | None = None
    """What it is called where reasons are counted, after `check_`; none: column and check."""
    severity: Severity = "quarantine"
    """As in `rules`."""
    max_fraction: Fraction | None = None
    """As in `rules`."""


class PrivacyConfig(Section):
    """Personal data, masked before anything is stored."""

    mask: bool = True
    """Replace what is found by [EMAIL_1], [PHONE_1], ..."""
    kinds: tuple[str, ...] = ("email", "phone", "card", "iban", "ip_address", "secret")
    """What is looked for."""
    phone_regions: tuple[str, ...] = ("US", "GB", "DE")
    """Countries whose national phone formats count; international ones (+49 ...) always do."""
    secrets: dict[str, str] = {}
    """Patterns of your own: name and regular expression."""
    engine: Literal["patterns", "presidio"] = "patterns"
    """presidio: what Presidio recognises beside the patterns; slow, and an extra: see `app/presidio.py`."""
    presidio_entities: tuple[str, ...] = ("PERSON", "LOCATION", "NRP", "CRYPTO", "US_SSN", "US_ITIN", "UK_NHS")
    """Which of Presidio's entities."""
    presidio_model: str | None = None
    """An installed spaCy pipeline, which names and places need; none: Presidio's patterns alone."""
    presidio_min_score: Fraction = 0.4
    """Findings that Presidio is less sure of are left alone."""


class NearDuplicatesConfig(Section):
    """Conversations whose text is nearly that of another one, found by MinHash and locality-sensitive hashing."""

    detect: bool = True
    """Compare each new conversation with all new and all held ones."""
    threshold: Fraction = 0.8
    """Jaccard similarity of their word 3-grams from which two conversations are near-duplicates."""


class AnomaliesConfig(Section):
    """Conversations unlike the accepted history."""

    detect: bool = True
    """Score every conversation; rule `anomaly` says what becomes of those beyond the threshold."""
    threshold: Positive = 8.0
    """Robust standard deviations from the median, of one feature or of all together by their Mahalanobis distance."""
    forest_threshold: Positive = 5.0
    """The same of the isolation forest's score, which hardly goes higher. What is stored as `anomaly_score` is the
    largest of these, the forest's scaled so that its threshold is `threshold`."""
    history: Count = 5_000
    """Accepted conversations the statistics are fitted on; of the first ingest's own where there are none."""


class ImputationConfig(Section):
    """Filling in what a record lacks; every value filled in is flagged and counted."""

    languages: tuple[str, ...] = ("en",)
    """Languages that a text without one is taken to be in, ISO 639-1; with one it is taken as given, with more it
    is detected; empty: not filled in."""
    min_language_confidence: Fraction = 0.9
    """Below it the language stays missing."""
    intent_model: str | None = None
    """Questions of a conversation without any label get the intents that the intent model of this model version gives
    them, a version of `registry.model` or `champion`; none: not filled in."""
    min_intent_confidence: Fraction = 0.95
    """Below it the intent stays missing."""
    channel: str | None = None
    """Channel of a record without one; none: `unknown`, and not counted as filled in."""
    started_at: bool = False
    """A record without a time gets that of its message, or of the file's last change."""


class DriftConfig(Section):
    """A new batch compared with the version before it."""

    detect: bool = True
    """Compare intents, lengths and vocabulary."""
    false_alarm_rate: Fraction = 0.01
    """How often a batch of the same kind may be called drifted."""
    min_conversations: Count = 200
    """Smaller batches are not compared."""
    stop: bool = False
    """Whether drift stops the stage; otherwise it is reported."""


class FollowConfig(Section):
    """Micro-batches without end."""

    enabled: bool = False
    """Go on reading until SIGTERM; `--follow` sets it."""
    interval_s: Positive = 10.0
    """From the beginning of one micro-batch to the next, unless `max_rows` messages or more are waiting."""
    max_rows: Count = 100_000
    """Most rows of a micro-batch from one Kafka source."""
    max_outage_s: Positive = 600.0
    """How long a source may be away before the stage fails."""
    max_batches: Natural = 0
    """Stop after so many micro-batches; 0: never."""


class IngestionConfig(Section):
    """From sources to a table version."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(uri="sample:shop", format="sample"),)
    """Everything to read, in order."""
    sample: SampleConfig = SampleConfig()
    """Settings of sources whose format is `sample`."""
    table: str = "support.conversations"
    """Iceberg table of accepted conversations, as namespace.name."""
    quarantine_table: str = "support.quarantine"
    """Iceberg table of refused records, with reason and source position."""
    validation_fraction: Fraction = 0.1
    """Share of conversations held out, chosen by content hash so that a conversation never changes side."""
    max_refused_fraction: Fraction = 0.1
    """A larger share of refused records stops the stage; nothing becomes a version."""
    max_message_chars: Count = 4_000
    """A longer message is refused."""
    max_messages: Count = 200
    """A longer conversation is refused."""
    channels: tuple[str, ...] = ("web", "app", "email", "phone", "social", "unknown")
    """Channels that exist; another one is refused. A record without one gets `unknown`."""
    languages: tuple[str, ...] = ()
    """Languages that exist; empty: any."""
    intents: tuple[str, ...] = ()
    """Intents that exist; empty: any."""
    rules: dict[RuleName, RuleConfig] = {}
    """What becomes of records that break a rule, where it is not the default (see `DEFAULT_RULES`)."""
    checks: tuple[CheckConfig, ...] = ()
    """Rules of your own."""
    privacy: PrivacyConfig = PrivacyConfig()
    """Personal data."""
    near_duplicates: NearDuplicatesConfig = NearDuplicatesConfig()
    """Nearly equal conversations."""
    anomalies: AnomaliesConfig = AnomaliesConfig()
    """Conversations unlike the others."""
    imputation: ImputationConfig = ImputationConfig()
    """Filling in what is missing."""
    drift: DriftConfig = DriftConfig()
    """Batches unlike the ones before."""
    follow: FollowConfig = FollowConfig()
    """Micro-batches without end."""
    batch_rows: Count = 2_048
    """Records a task works on at a time."""

    @model_validator(mode="after")
    def _consistent(self) -> "IngestionConfig":
        followed = Counter(
            f"{source.format} source {source.identity!r}"
            for source in self.sources
            if source.format in ("kafka", "sql")
        )
        if twice := [name for name, count in followed.items() if count > 1]:
            raise ValueError(f"{twice[0]} is there twice, and both would go on from one place: give each a `name`")
        named = Counter(check.name or f"{check.column}_{check.check}" for check in self.checks)
        if same := [name for name, count in named.items() if count > 1]:
            raise ValueError(f"two checks are called {same[0]}: give each a `name`")
        unreadable = [name for name in self.rules if name in get_args(UnreadableRule)]
        for name in unreadable:
            if self.rules[name].severity == "warn":
                raise ValueError(f"rules.{name} cannot be a warning: such a record holds no conversation to accept")
        return self

    def rule(self, name: RuleName) -> RuleConfig:
        """What holds for a rule: what is declared, else its default."""
        return self.rules.get(name) or DEFAULT_RULES.get(name) or QUARANTINE


QUARANTINE = RuleConfig()
DEFAULT_RULES: dict[RuleName, RuleConfig] = {
    "near_duplicate": RuleConfig(severity="drop"),
    "unexpected_column": RuleConfig(severity="warn"),
    "mojibake": RuleConfig(severity="warn"),
    "duplicate_conversation_id": RuleConfig(severity="warn"),
}
