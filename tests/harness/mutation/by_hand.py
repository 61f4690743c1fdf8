"""Faults of meaning, by file: what the change of one operator does not reach.

Each is what it breaks: (old text, new text). The old text occurs once in the file; a change of the code that removes it
also has to say here what becomes of the fault.
"""

from __future__ import annotations

from tests.harness.mutation.operators import Fault

FAULTS: dict[str, dict[str, tuple[str, str]]] = {
    "dataset/commit.py": {
        "no look after an unknown outcome": ("if self._is_there(uri):", "if False:"),
        "a refusal is repeated": ("            except AccessDenied:\n                raise\n", ""),
        "a driver that loses the race keeps its own record": (
            'return data if self.put_once(name, data) == "created" else',
            "return data if self.put_once(name, data) else",
        ),
        "files without a plan are adopted": ("            self._refuse_foreign_files()\n", ""),
        "another run is resumed": ("        check_same_run(plan, identities, self.uri)\n", ""),
        "temporary files are never removed": ("        self.store.sweep(self.uri)\n", ""),
        "hidden Parquet files are not seen": ('is_visible(name) or name.endswith(".parquet"))', "is_visible(name))"),
    },
    "engine/session.py": {
        "batches are written in order of arrival": ("buffer.in_order()", "list(buffer.batches.values())"),
        "a failed commit ends as a success": ("        self.committer.raise_failures()\n", ""),
        "failed parts end as a success": ("        if self.collector.failed:\n            raise self._failure()\n", ""),
        "a store that overwrites is used": ("        self.output.check_store()\n", ""),
    },
    "engine/part_collector.py": {
        "a part that is complete becomes a failed one": ("if result.part_index not in self.complete:", "if True:"),
        "a complete part is collected again": (
            "if index in self.failed or index in self.complete:",
            "if index in self.failed:",
        ),
    },
    "engine/committer.py": {
        "our footer stands for another driver's file": (
            'if self.output.put_once(name, encoded.data) == "created":',
            "if self.output.put_once(name, encoded.data):",
        ),
        "files that are there are put again": (
            "for model in self.models[part.index]:",
            "for model in self.plan.identities:",
        ),
    },
    "dataset/part_file.py": {
        "a buffer gives batches in order of arrival": ("for k in sorted(self.batches)]", "for k in self.batches]"),
        "a batch that comes twice counts twice": (
            "self.batches.setdefault(embedded.k, embedded)",
            "self.batches[len(self.batches)] = embedded",
        ),
        "rejects are sorted by key": ("key=lambda reject: reject.row", "key=lambda reject: reject.key"),
        "pages have no checksums": ("write_page_checksum=True", "write_page_checksum=False"),
        "bytes depend on the order of a mapping": ("json.dumps(about, sort_keys=True)", "json.dumps(about)"),
    },
    "dataset/finalize.py": {
        "a job ends without a missing file": (
            "check_complete(output, records, history, files, generation)\n    plan",
            "plan",
        ),
        "the last model's reason is counted": (
            'seen.setdefault(row, reject["reason"])',
            'seen[row] = reject["reason"]',
        ),
        "the rarest reason comes first": ("item: (-item[1], item[0])", "item: (item[1], item[0])"),
        "the manifest is in order of the footers": ('.sort_by("file")', ""),
    },
    "dataset/plan.py": {
        "all parts are done again": ("if name not in there:", "if index not in there:"),
        "of two models, only the last is done": ("lack = (*left.get(index, ()), model)", "lack = (model,)"),
        "a part outgrows one PUT": (
            "min(job.output.rows_per_part, PART_BYTES",
            "max(job.output.rows_per_part, PART_BYTES",
        ),
    },
    "storage/s3.py": {
        "a PUT overwrites": (', "IfNoneMatch": "*"', ""),
        "an etag is not compared in a reply": (
            "(size_bytes, etag) != (expect.size_bytes, expect.etag or etag):",
            "size_bytes != expect.size_bytes:",
        ),
        "a read does not ask for its version": ("if expect is not None and expect.etag else {}", "if False else {}"),
        "an error page under status 200 is a commit": (
            'if not answer.get("ETag"):\n                raise OutcomeUnknown',
            "if False:\n                raise OutcomeUnknown",
        ),
        "a PUT of unknown outcome is repeated": ("again=lambda fault: fault.is_undone,", ""),
    },
    "storage/disk.py": {
        "a file is named before it is durable": ("        os.fsync(file.fileno())\n", ""),
        "a file overwrites": ("os.link(temporary, final)", "temporary.replace(final)"),
    },
    "storage/retry.py": {
        "a 500 is taken for undone": ("REFUSED_UNDONE = {409, 429, 503}", "REFUSED_UNDONE = {409, 429, 500, 503}"),
    },
    "read/tar.py": {
        "a header's checksum is not verified": (
            "(claimed != unsigned and claimed != _signed(block, unsigned))",
            "False",
        ),
        "a wrong size swallows members": ("inner = find_header(body, aligned=True)", "inner = None"),
        "global records are forgotten": ("{**self.global_records, **records}", "records"),
        "digits behind a NUL count": ('field.split(b"\\0", 1)[0].strip(b" ")', 'field.strip(b" \\0")'),
    },
    "read/tar_samples.py": {
        "a sample after a damage is not marked": ("sample = TarSample(beside_damage=True)", "sample = TarSample()"),
    },
    "images/decode.py": {
        "red and blue are exchanged": (
            'return _turbo(view, "RGB", header, policy.salvage)',
            'return _turbo(view, "BGR", header, policy.salvage)',
        ),
        "orientations 6 and 7 are exchanged": ("in (3, 4, 7, 8)", "in (3, 4, 6, 8)"),
        "a mended JPEG is salvaged": (
            "simplejpeg.decode_jpeg(mended, colorspace, strict=True",
            "simplejpeg.decode_jpeg(mended, colorspace, strict=False",
        ),
    },
    "images/orientation.py": {
        "XMP goes before EXIF": ("    if stored is None:\n", "    if xmp:\n"),
        "an orientation of 0 is an orientation": ("if 1 <= stored <= 8", "if stored <= 8"),
    },
    "images/tiff.py": {
        "16-bit TIFFs are inverted the wrong way": (
            "photometric == _WHITE_IS_ZERO and",
            "photometric != _WHITE_IS_ZERO and",
        ),
    },
    "images/preprocess.py": {
        "the long side is rounded": (
            "int(settings.resize_height * long / short)",
            "round(settings.resize_height * long / short)",
        ),
        "wide images are squashed": (
            "if source_HW[1] <= source_HW[0] else (new_short, new_long)",
            "if source_HW[1] <= source_HW[0] else (new_long, new_short)",
        ),
        "wide images are squashed where the long side is bounded": (
            "if source_HW[1] < source_HW[0] else (new_short, new_long)",
            "if source_HW[1] < source_HW[0] else (new_long, new_short)",
        ),
        "a scaled side is rounded": ("side * final // crop", "round(side * final / crop)"),
        "the mean is subtracted last": ("x_BCHW.sub_(mean_C11).div_(std_C11)", "x_BCHW.div_(std_C11).sub_(mean_C11)"),
        "a shrunk image is shifted": ("size_HW[::-1], code, box", "size_HW[::-1], code"),
    },
    "outputs/labels.py": {
        "ties for the last rank are left to topk": ("    if tied_B.any():", "    if False:"),
        "the worst class comes first": (
            "logits_BK.gather(1, ids_Bk).argsort(dim=1, descending=True, stable=True)",
            "logits_BK.gather(1, ids_Bk).argsort(dim=1, stable=True)",
        ),
        "a threshold hides negative regression values": ('| (self.score_function(card) == "none")', ""),
    },
    "outputs/score_function.py": {
        "softmax over the batch": ("logits_BK.softmax(dim=1)", "logits_BK.softmax(dim=0)"),
        "one class is always certain": (' or num_labels == 1 else "softmax"', ' else "softmax"'),
    },
    "outputs/segmentation.py": {
        "the higher of equal classes wins": ("better_HW = values_HW > best_HW", "better_HW = values_HW >= best_HW"),
        "classes of later chunks are numbered from 0": ("(places_HW + first)", "places_HW"),
        "run lengths go by rows": (
            "np.ascontiguousarray(ids_HW.T).reshape(-1)",
            "np.ascontiguousarray(ids_HW).reshape(-1)",
        ),
        "run lengths are decoded wrongly": ("if len(counts) > 2 else value", "if len(counts) > 3 else value"),
    },
    "outputs/resize_maps.py": {
        "masks are stretched to the corners": ("align_corners=False", "align_corners=True"),
    },
}


def faults_by_hand(file: str, source: str) -> list[Fault]:
    """Return the faults of one file. Raises ValueError when an old text does not occur once."""
    found = []
    for breaks, (old, new) in FAULTS.get(file, {}).items():
        if source.count(old) != 1:
            raise ValueError(f"by_hand.py: {file} has {source.count(old)} times: {old}")
        start = source.index(old)
        found.append(Fault(f"{file}: {breaks}", file, "by hand", start, start + len(old), new))
    return found
