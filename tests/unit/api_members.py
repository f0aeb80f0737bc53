"""The members of vLLM's `KVConnectorBase_V1`, read from its source without importing it.

`python tests/unit/api_members.py PATH/TO/vllm > tests/unit/data/members-0.NN.json` records a new version, after
somebody has read what changed and the connector handles it.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

BASE = "distributed/kv_transfer/kv_connector/v1/base.py"
CLASSES = ("KVConnectorBase_V1", "SupportsHMA", "KVConnectorWorkerMetadata", "KVConnectorTransferResults")


def members(vllm_dir: Path) -> dict[str, dict[str, str]]:
    """Class -> member -> its signature (methods) or annotation (fields), as vLLM's source at `vllm_dir` has it."""
    tree = ast.parse((vllm_dir / BASE).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return {name: _members(classes[name]) for name in CLASSES}


def _members(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            marks = "".join(f"@{ast.unparse(decorator)} " for decorator in item.decorator_list)
            returns = f" -> {ast.unparse(item.returns)}" if item.returns is not None else ""
            found[item.name] = f"{marks}({ast.unparse(item.args)}){returns}"
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = ast.unparse(item.annotation)
        elif isinstance(item, ast.Assign):
            found.update({target.id: "=" for target in item.targets if isinstance(target, ast.Name)})
    return found


if __name__ == "__main__":
    json.dump(members(Path(sys.argv[1])), sys.stdout, indent=1, sort_keys=True)
    print()
