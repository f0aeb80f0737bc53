"""Writes blade_kvt.json: what Blade-KVT's ParseBlock sends for one full block, by its published formulas.

Every record is [source rank, destination rank, source offset, destination offset, bytes]; a source rank
of -1 stands for any rank that holds a copy. Offsets count from the layer's tensor. The formulas are those
of llumnix-kv's include/parse_block_*.h (commit notes in research/llumnix-kv.md, section 3.1), written out
again here one by one, without any notion of a stride.

usage: python blade_kvt.py        (no dependencies; the output is checked in)
"""

import json
from itertools import product
from pathlib import Path


def merged(records):
    out = []
    for record in sorted(records):
        if out:
            last = out[-1]
            if last[:2] == record[:2] and last[2] + last[4] == record[2] and last[3] + last[4] == record[3]:
                last[4] += record[4]
                continue
        out.append(list(record))
    return out


def pairs(p, d):
    """(p rank, d rank, offset in the group) for tensor-parallel sizes that divide each other."""
    if p >= d:
        n = p // d
        return [(r, r // n, r % n) for r in range(p)]
    n = d // p
    return [(r // n, r, r % n) for r in range(d)]


def swapped(records):
    return [[d, p, dst, src, n] for p, d, src, dst, n in records]


def ragged_gt(tokens, p_tok, d_tok, p, d, b_s, b_d):
    out = []
    p_block, d_block = tokens * p_tok, tokens * d_tok
    pk, dk = p_tok // 2, d_tok // 2
    for r, to, off in pairs(p, d):
        for t in range(tokens):
            src = b_s * p_block + t * p_tok
            dst = b_d * d_block + t * d_tok + off * pk
            out += [[r, to, src, dst, pk], [r, to, src + pk, dst + dk, pk]]
    return out


def ragged(case):
    p, d, tokens, hd, heads = case["p"], case["d"], case["tokens"], case["head_bytes"], case["heads"]
    p_tok, d_tok = 2 * heads // p * hd, 2 * heads // d * hd
    b_s, b_d = case["src"], case["dst"]
    if p == d:
        return [[r, r, b_s * tokens * p_tok, b_d * tokens * d_tok, tokens * p_tok] for r in range(p)]
    if p > d:
        return ragged_gt(tokens, p_tok, d_tok, p, d, b_s, b_d)
    return swapped(ragged_gt(tokens, d_tok, p_tok, d, p, b_d, b_s))


def flash(case):
    p, d, tokens, hd, heads = case["p"], case["d"], case["tokens"], case["head_bytes"], case["heads"]
    p_tok, d_tok = 2 * heads // p * hd, 2 * heads // d * hd
    out = []
    pk, dk = p_tok // 2, d_tok // 2
    p_kblock, d_kblock = tokens * pk, tokens * dk
    for r, to, off in pairs(p, d):
        for t in range(tokens):
            src = case["src"] * p_kblock + t * pk
            dst = case["dst"] * d_kblock + t * dk + off * pk
            out.append([r, to, src, dst, pk])
            out.append([r, to, src + p_kblock * case["src_blocks"], dst + d_kblock * case["dst_blocks"], pk])
    return out


def flashinfer(case):
    p, d, tokens, heads = case["p"], case["d"], case["tokens"], case["heads"]
    hd = case["head_bytes"]
    p_tok, d_tok = 2 * heads // p * hd, 2 * heads // d * hd
    p_block, d_block = tokens * p_tok, tokens * d_tok
    local, section = heads // p, tokens * hd
    out = []
    for r, to, off in pairs(p, d):
        for h in range(local):
            src = case["src"] * p_block + h * section
            dst = case["dst"] * d_block + off * local * section + h * section
            out.append([r, to, src, dst, section])
            out.append([r, to, src + p_block // 2, dst + d_block // 2, section])
    return out


def hybrid_gt(case, p, d, heads, kp, kd, b_s, b_d):
    hd, tokens, pack = case["head_bytes"], case["tokens"], case.get("pack", 1)
    p_tok, d_tok = 2 * heads // p * hd, 2 * heads // d * hd
    p_block = tokens * p_tok * pack + case.get("pad", 0)
    d_block = tokens * d_tok * pack + case.get("pad", 0)
    p_kb, d_kb = kp * p_tok, kd * d_tok
    out = []
    for layer, (r, to, off) in product(range(pack), pairs(p, d)):
        for t in range(tokens):
            src = b_s * p_block + (t // kp * pack + layer) * p_kb + t % kp * (p_tok // 2)
            dst = b_d * d_block + (t // kd * pack + layer) * d_kb + t % kd * (d_tok // 2) + off * (p_tok // 2)
            out += [[r, to, src, dst, p_tok // 2], [r, to, src + p_kb // 2, dst + d_kb // 2, p_tok // 2]]
    return out


def hybrid(case):
    p, d = case["p"], case["d"]
    kp, kd = case.get("p_kernel", case["tokens"]), case.get("d_kernel", case["tokens"])
    if p >= d:
        return hybrid_gt(case, p, d, case["heads"], kp, kd, case["src"], case["dst"])
    return swapped(hybrid_gt(case, d, p, case["heads"], kd, kp, case["dst"], case["src"]))


def hybrid_hnd(case):
    """7: kernel pages head by head; unequal sizes as in 5, inside each kernel block."""
    p, d, tokens, heads, hd = case["p"], case["d"], case["tokens"], case["heads"], case["head_bytes"]
    kernel = case["p_kernel"]
    p_tok, d_tok = 2 * heads // p * hd, 2 * heads // d * hd
    p_block, d_block = tokens * p_tok + case.get("pad", 0), tokens * d_tok + case.get("pad", 0)
    local, section = heads // p, kernel * hd
    out = []
    for (r, to, off), k, h in product(pairs(p, d), range(tokens // kernel), range(local)):
        src = case["src"] * p_block + k * kernel * p_tok + h * section
        dst = case["dst"] * d_block + k * kernel * d_tok + (off * local + h) * section
        out.append([r, to, src, dst, section])
        out.append([r, to, src + kernel * p_tok // 2, dst + kernel * d_tok // 2, section])
    return out


def rows(case):
    """1 with MLA, 8's MLA, the hybrid indexer: the same rows on all ranks, at the start of a page."""
    n = case["tokens"] * case["row"]
    src, dst = case["src"] * (n + case.get("pad", 0)), case["dst"] * (n + case.get("pad", 0))
    return [[-1, to, src, dst, n] for to in range(case["d"])]


def sparse_mla(case):
    out = []
    for base, row in ((0, case["row"]), (case["index_base"], case["index_row"])):
        n = case["tokens"] * row
        out += [[-1, to, base + case["src"] * n, base + case["dst"] * n, n] for to in range(case["d"])]
    return out


def state_gt(case, n, pair, b_s, b_d):
    """conv rows by channels, then one run of recurrent state; n sources to a destination."""
    es, rows_, parts, ranks = case["element"], case["rows"], case["parts"], case["split"]
    local = [c // ranks * es for c in parts]
    row, ssm = sum(local), case["heads"] // ranks * case["head_bytes"]
    conv = rows_ * row
    p_page, d_page = conv + ssm + case["pad"], n * (conv + ssm) + case["pad"]
    out = []
    for r, to, off in pair:
        src, dst, inner = b_s * p_page, b_d * d_page, 0
        for length in local:
            if case["channels_first"]:
                run = length * rows_
                out.append([r, to, src + inner * rows_, dst + n * inner * rows_ + off * run, run])
            else:
                for line in range(rows_):
                    at = dst + line * n * row + n * inner + off * length
                    out.append([r, to, src + line * row + inner, at, length])
            inner += length
        out.append([r, to, src + conv, dst + n * conv + off * ssm, ssm])
    return out


def state(case):
    p, d = case["p"], case["d"]
    case = {**case, "split": max(p, d)}
    if p >= d:
        return state_gt(case, p // d, pairs(p, d), case["src"], case["dst"])
    records = state_gt(case, d // p, [(to, r, off) for r, to, off in pairs(p, d)], case["dst"], case["src"])
    return swapped(records)


KV = {"tokens": 4, "heads": 4, "head_bytes": 6, "src_blocks": 5, "dst_blocks": 3, "src": 4, "dst": 1}
ALL = [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (1, 2), (2, 4), (1, 4)]
DOWN = [pair for pair in ALL if pair[0] >= pair[1]]


def cases():
    def case(number, shape, ranks, formula, **more):
        made = {"number": number, "shape": shape, "p": ranks[0], "d": ranks[1], **KV, **more}
        return {**made, "records": merged(formula(made))}

    kernels = {"tokens": 8, "p_kernel": 4, "d_kernel": 2, "pad": 10}
    states = {"rows": 3, "parts": [8, 8, 4], "element": 2, "head_bytes": 20, "pad": 12}
    for ranks in ALL:
        yield case(1, "ragged", ranks, ragged)
        yield case(1, "rows", ranks, rows, row=18)
        yield case(3, "hybrid", ranks, hybrid, **kernels)
        yield case(3, "hybrid", ranks, hybrid, **kernels, pack=2)
        yield case(3, "state", ranks, state, **states, channels_first=False)
        yield case(3, "indexer", ranks, rows, row=7, pad=20)
        yield case(4, "sparse_mla", ranks, sparse_mla, row=18, index_row=7, index_base=1000)
        yield case(8, "rows", ranks, rows, row=18, pad=31)
        yield case(8, "state", ranks, state, **states, channels_first=True)
    for ranks in DOWN:
        yield case(2, "flash", ranks, flash)
        yield case(5, "flashinfer", ranks, flashinfer)
        yield case(6, "turboquant", ranks, hybrid, head_bytes=5, **kernels)
        yield case(7, "hybrid_hnd", ranks, hybrid_hnd, tokens=8, p_kernel=4, d_kernel=4, pad=10)


def main():
    text = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases())
    Path(__file__).with_suffix(".json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
