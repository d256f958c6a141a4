"""The page of the interface, made from its OpenAPI description: no script, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.55 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem 1.25rem 3rem; }
h2 { margin-top: 2.2rem; border-top: 1px solid #8888; padding-top: 1rem; overflow-wrap: anywhere; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; }
td:first-child { white-space: nowrap; }
"""


def reference_page(schema: dict[str, Any]) -> str:
    """HTML of every operation, its parameters and answers, and of the fields of the answers."""
    parts = [
        f"<h1>{escape(schema['info']['title'])} {escape(schema['info']['version'])}</h1>",
        f"<p>{escape(schema['info'].get('description', ''))} The same for programs: "
        '<a href="openapi.json">openapi.json</a>. <a href="./">The page</a>.</p>',
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(path, method, operation))
    for name, model in schema["components"]["schemas"].items():
        if "properties" in model and name not in ("HTTPValidationError", "ValidationError"):
            rows = [
                (field, _kind(value), value.get("description", ""))
                for field, value in model["properties"].items()
            ]
            about = escape(model.get("description", ""))
            parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2><p>{about}</p>{_table(rows)}')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Interface of the service</title><style>{_STYLE}</style></head><body><main>"
        + "\n".join(parts)
        + "</main></body></html>\n"
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"?{one['name']}=", _kind(one["schema"]), one.get("description", ""))
        if one["in"] == "query"
        else (f"{{{one['name']}}}", _kind(one["schema"]), one.get("description", ""))
        for one in operation.get("parameters", [])
    ]
    body = operation.get("requestBody", {}).get("content", {})
    for kind, content in body.items():
        for name, value in content["schema"].get("properties", {}).items():
            rows.append((name, f"{kind} {_kind(value)}", value.get("description", "")))
    answers = []
    for status, answer in operation["responses"].items():
        models = [_kind(content.get("schema", {})) for content in answer.get("content", {}).values()]
        answers.append((status, ", ".join(filter(None, models)), answer.get("description", "")))
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}</p>"
        + (_table(rows) if rows else "")
        + _table(answers)
    )


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    return str(schema.get("type", ""))


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(words)}</td></tr>"
        for name, kind, words in rows
    )
    return f"<table>{lines}</table>"
