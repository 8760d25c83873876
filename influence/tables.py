"""The tables of an export: what each column is, and the same rows as CSV, Parquet, JSON lines or a spreadsheet.

Tables are long and tidy; empty is missing. Text cells that a spreadsheet would read as a formula get an apostrophe in
CSV (CWE-1236); in the other formats text is text. Equal tables give equal bytes.
"""

import io
import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from influence.errors import OptionError
from influence.spreadsheet import csv_bytes
from influence.verdicts import VERDICTS

FORMATS = ("csv", "parquet", "jsonl", "xlsx")
_ROWS, _CELL = 1_048_576, 32_767  # what a spreadsheet holds


@dataclass(frozen=True)
class Field:
    """One column, in the words of Table Schema."""

    name: str
    type: str
    """`string`, `integer`, `number` or `boolean`."""
    unit: str
    """Empty if it has none."""
    description: str
    required: bool = False
    enum: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """One table."""

    title: str
    fields: tuple[Field, ...]
    primary_key: tuple[str, ...]
    foreign_keys: tuple[tuple[str, str, str], ...] = ()
    """Column, table and column that it refers to."""


_LOSS = "mean squared error"
_SCORE = "change of the query's loss per unit of training weight"
_RELATIVE = "root of a change of the loss"
_QUERY = Field("query_id", "string", "", "hash of the picture and its prompt", True)
_CREATOR = Field("contributor_id", "string", "", "who; see contributors", True)

SCHEMA: dict[str, Schema] = {
    "queries": Schema("Pictures that were asked about", (
        _QUERY,
        Field("file", "string", "", "as it was given", True),
        Field("prompt", "string", "", "as it was given"),
        Field("verdict", "string", "", "what the numbers allow to say", True, VERDICTS),
        Field("reason", "string", "", "why, in a sentence", True),
        Field("loss_finetuned", "number", _LOSS, "training loss under the fine-tuned model", True),
        Field("loss_base", "number", _LOSS, "the same draws under the model before the fine-tune; empty: not known"),
        Field("finetune_gain", "number", _LOSS, "loss_base - loss_finetuned: what there is to attribute"),
        Field("gain_se", "number", _LOSS, "its standard error, from neighbouring draws"),
        Field("gain_p", "number", "probability", "one-sided p-value of a gain above 0"),
        Field("gain_p_null", "number", "probability", "share of controls with at least this gain"),
        Field("gain_bits", "number", "bits per dimension", "the gain with the weights of the evidence bound"),
        Field("gain_bits_se", "number", "bits per dimension", "its standard error, from neighbouring draws"),
        Field("near_copy", "boolean", "", "nearly a training picture, by looks; says nothing of influence", True),
        Field("max_similarity", "number", "-1 to 1", "to the training picture that looks most like it", True),
        Field("max_similarity_item", "string", "", "which; see items", True),
        Field("similarity_metric", "string", "", "how likeness was measured", True),
        Field("reliability", "number", "0 to 1", "part of the variance of creators' totals that is not error of draws"),
        Field("unattributed_share", "number", "fraction", "by gated_group_sum: of creators no more than chance"),
        Field("base_model_share", "number", "fraction", "1 if the fine-tune does not explain the picture", True),
    ), ("query_id",), (("max_similarity_item", "items", "item_id"),)),
    "attributions": Schema("Scores of training images", (
        _QUERY,
        Field("rank", "integer", "", "1 is the highest score", True),
        Field("item_id", "string", "", "training image; see items", True),
        Field("file_name", "string", "", "in the data set", True),
        _CREATOR,
        Field("score", "number", _SCORE, "above 0: training on it lowered the query's loss", True),
        Field("score_se", "number", _SCORE, "standard error, from batches of draws of both pictures"),
        Field("score_low", "number", _SCORE, "95 % interval of draws; not of training again"),
        Field("score_high", "number", _SCORE, "95 % interval of draws; not of training again"),
        Field("rank_low", "integer", "", "1 + images whose interval is above this one's; empty: not all were listed"),
        Field("rank_high", "integer", "", "images whose interval is not below this one's"),
        Field("leverage", "number", "0 to 0.9", "h: how much of it is lost because the image was trained on", True),
        Field("score_adj", "number", _SCORE, "score / (1 - h): comparable with images never trained on", True),
        Field("score_rel", "number", _RELATIVE, "score / root of its score for itself: what p-values compare", True),
        Field("z_null", "number", "robust standard deviations", "score_rel against the controls"),
        Field("p_value", "number", "probability", "(1 + controls with score_rel as high) / (1 + controls)"),
        Field("q_value", "number", "probability", "Benjamini-Hochberg over all images of the query"),
        Field("similarity", "number", "-1 to 1", "how alike the pictures look, for contrast", True),
        Field("dup_cluster_id", "string", "", "near duplicates share an id and their credit", True),
    ), ("query_id", "item_id", "file_name"), (
        ("query_id", "queries", "query_id"), ("item_id", "items", "item_id"),
        ("contributor_id", "contributors", "contributor_id"),
    )),
    "shares": Schema("Shares by estimator: research estimates", (
        Field("query_id", "string", "", "a query, or ALL: the statement over all with their usage", True),
        _CREATOR,
        Field("estimator", "string", "", "how it was divided; see run.json", True),
        Field("attribution", "boolean", "", "false: a baseline that says nothing of influence", True),
        Field("n_works", "number", "works", "of the creator; near duplicates are one, of several creators a part"),
        Field("group_score", "number", _SCORE, "signed total before any cut, see totals in run.json"),
        Field("group_score_se", "number", _SCORE, "its standard error, from batches of draws"),
        Field("gain_alone", "number", _LOSS, "what a fine-tune on its works alone takes off the loss; empty without"),
        Field("p_null_group", "number", "probability", "of the total, when works and controls change places at random"),
        Field("q_fdr_group", "number", "probability", "Benjamini-Hochberg over creators"),
        Field("share", "number", "fraction", "sums to 1 over a query and estimator", True),
        Field("share_low", "number", "fraction", "95 % interval: draws, and works of a creator", True),
        Field("share_high", "number", "fraction", "95 % interval: draws, and works of a creator", True),
        Field("share_per_work", "number", "fraction", "share / n_works"),
        Field("corpus_share", "number", "fraction", "part of the training images"),
        Field("lift", "number", "ratio", "share / corpus_share"),
        Field("prob_positive", "number", "probability", "of a share above 0, over repeats", True),
        Field("prob_top1", "number", "probability", "of the largest share, over repeats"),
        Field("amount", "number", "currency", "part of the pool, if one was given"),
        Field("currency", "string", "", "ISO 4217"),
    ), ("query_id", "contributor_id", "estimator"), (("contributor_id", "contributors", "contributor_id"),)),
    "styles": Schema("Trained works of a creator against works of the same creator that were held out", (
        _QUERY,
        _CREATOR,
        Field("n_trained", "number", "works", "trained on; near duplicates are one", True),
        Field("n_heldout", "integer", "works", "never trained on", True),
        Field("mean_trained", "number", _SCORE, "mean score_adj of trained works", True),
        Field("mean_heldout", "number", _SCORE, "mean score of held-out works", True),
        Field("gap", "number", _SCORE, "difference: around 0, a recognised style does not show contribution", True),
        Field("gap_low", "number", _SCORE, "95 % interval (Welch)", True),
        Field("gap_high", "number", _SCORE, "95 % interval (Welch)", True),
        Field("p_gap", "number", "probability", "two-sided p-value of no difference"),
    ), ("query_id", "contributor_id"), (
        ("query_id", "queries", "query_id"), ("contributor_id", "contributors", "contributor_id"),
    )),
    "controls": Schema("Scores of images that were never trained on", (
        _QUERY,
        Field("control_id", "string", "", "see items", True),
        Field("creator", "string", "", "as its metadata say", True),
        Field("score", "number", _SCORE, "as if it had been trained on", True),
        Field("score_rel", "number", _RELATIVE, "score / root of its score for itself", True),
    ), ("query_id", "control_id"), (("query_id", "queries", "query_id"), ("control_id", "items", "item_id"))),
    "items": Schema("Training images and controls, one row for each file", (
        Field("item_id", "string", "", "hash of the picture and its caption", True),
        Field("file_name", "string", "", "in its data set", True),
        Field("caption", "string", "", ""),
        Field("contributor_id", "string", "", "who", True),
        Field("creator", "string", "", "as the metadata say", True),
        Field("licence", "string", "", "as the metadata say"),
        Field("split", "string", "", "", True, ("train", "control")),
        Field("train_weight", "number", "files", "how many files are this image", True),
        Field("dup_cluster_id", "string", "", "near duplicates of each other have the same"),
    ), ("split", "item_id", "file_name")),
    "contributors": Schema("Creators, and what is in place of one", (
        _CREATOR,
        Field("name", "string", "", "as the metadata say", True),
        Field("n_works", "integer", "files", "that were trained on", True),
        Field("n_heldout", "integer", "works", "controls of the same name", True),
    ), ("contributor_id",)),
}  # fmt: skip

_ARROW = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
_AMOUNT = pa.decimal128(38, 6)


def write(name: str, table: pd.DataFrame, form: str) -> bytes:
    """The bytes of a table's file.

    Args:
        name: Of the table, in `SCHEMA`.
        table: Its rows; columns are put in the schema's order.
        form: Of `FORMATS`.

    Raises:
        OptionError: The format is unknown, needs a package that is not there, or cannot hold the table.
    """
    if form not in FORMATS:
        raise OptionError(f"format {form!r} is unknown; expected one of {', '.join(FORMATS)}")
    return _WRITERS[form](name, typed(name, table))


def typed(name: str, table: pd.DataFrame) -> pa.Table:
    """A table with exactly the columns and types of its schema."""
    columns = {}
    for field in SCHEMA[name].fields:
        values: list[Any] = [None if pd.isna(value) else value for value in table[field.name].tolist()]
        if field.name == "amount":
            columns[field.name] = pa.array(values, _AMOUNT)
        elif field.type == "integer":
            columns[field.name] = pa.array([None if v is None else int(v) for v in values], pa.int64())
        elif field.type == "string":
            columns[field.name] = pa.array([None if v is None else _valid(str(v)) for v in values], pa.string())
        else:
            columns[field.name] = pa.array(values, _ARROW[field.type])
    return pa.table(columns)


def _valid(text: str) -> str:
    """Text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _csv(name: str, table: pa.Table) -> bytes:
    frame = pd.DataFrame({column: table[column].to_pylist() for column in table.column_names}, dtype=object)
    for field in SCHEMA[name].fields:
        if field.type == "boolean":
            frame[field.name] = [None if value is None else str(value).lower() for value in frame[field.name]]
    return csv_bytes(frame)


def _parquet(name: str, table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def _jsonl(name: str, table: pa.Table) -> bytes:
    lines = [json.dumps(row, ensure_ascii=False, default=_json) for row in table.to_pylist()]
    return "".join(line + "\n" for line in lines).encode()


def _json(value: Any) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(type(value))


def _xlsx(name: str, table: pa.Table) -> bytes:
    try:
        import xlsxwriter
    except ImportError:
        raise OptionError("xlsx needs XlsxWriter; run pip install 'influence[xlsx]', or use another format") from None
    texts = [field.name for field in SCHEMA[name].fields if field.type == "string"]
    longest = max((len(text or "") for column in texts for text in table[column].to_pylist()), default=0)
    if longest > _CELL:
        raise OptionError(f"a text in {name} has {longest} characters, a cell {_CELL} at most; use another format")
    if table.num_rows >= _ROWS:
        raise OptionError(f"{name} has {table.num_rows} rows, a spreadsheet {_ROWS - 1} at most; use parquet or csv")
    buffer = io.BytesIO()
    book = xlsxwriter.Workbook(buffer, {"in_memory": True, "strings_to_formulas": False, "strings_to_urls": False})
    book.set_properties({"created": pd.Timestamp("2000-01-01").to_pydatetime()})  # equal tables, equal bytes
    sheet = book.add_worksheet(name)
    for column, field in enumerate(SCHEMA[name].fields):
        sheet.write_string(0, column, field.name)
        for row, value in enumerate(table[field.name].to_pylist(), 1):
            if value is None:
                continue
            if field.type == "string":
                sheet.write_string(row, column, value)
            elif field.type == "boolean":
                sheet.write_boolean(row, column, value)
            else:
                sheet.write_number(row, column, float(value))
    book.close()
    return buffer.getvalue()


_WRITERS = {"csv": _csv, "parquet": _parquet, "jsonl": _jsonl, "xlsx": _xlsx}


def datapackage(form: str, hashes: dict[str, str]) -> dict[str, Any]:
    """`datapackage.json` (Data Package v1, Table Schema): types, units, keys."""
    resources = []
    for name, schema in SCHEMA.items():
        fields = []
        for field in schema.fields:
            entry: dict[str, Any] = {"name": field.name, "type": field.type, "description": field.description}
            if field.unit:
                entry["unit"] = field.unit
            constraints: dict[str, Any] = {"required": True} if field.required else {}
            if field.enum:
                constraints["enum"] = list(field.enum)
            fields.append(entry | ({"constraints": constraints} if constraints else {}))
        keys = [
            {"fields": [column], "reference": {"resource": table, "fields": [other]}}
            for column, table, other in schema.foreign_keys
        ]
        resource: dict[str, Any] = {"name": name, "title": schema.title, "path": f"{name}.{form}", "format": form}
        if form == "csv":
            resource |= {"encoding": "utf-8", "csv_escaping": "text that begins like a formula has an apostrophe"}
        resource["hash"] = f"sha256:{hashes[name]}"
        described = {"fields": fields, "missingValues": [""], "primaryKey": list(schema.primary_key)}
        resource["schema"] = described | ({"foreignKeys": keys} if keys else {})
        resources.append(resource)
    return {"name": "influence-export", "profile": "data-package", "resources": resources}
