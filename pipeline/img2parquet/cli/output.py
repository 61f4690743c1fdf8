"""Print summaries, status and plans. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from img2parquet.errors import printable
from img2parquet.telemetry import logs


def say(text: str, file: TextIO | None = None) -> None:
    """Print one message. Control characters are escaped: keys, names and server messages may contain them."""
    if file is sys.stderr and logs.is_json():
        logs.write_line(text, level="error" if text.startswith(("error:", "Traceback")) else "info")
        return
    print(printable(text), file=file)


def json_line(values: object) -> str:
    """Serialize to one line of ASCII JSON without control characters."""
    return json.dumps(values).replace("\x7f", "\\u007f")


def print_summary(summary: Any) -> None:
    """Print the summary of a finished job."""
    done_now = summary.parts - summary.parts_done_before
    if summary.added:
        say(f"extended   no. {summary.generation}: {summary.added:,} new files")
    if summary.shard:
        say(f"slice      {summary.shard}" + ("" if summary.parts_left else ": every part of the job is committed"))
    if not summary.parts:
        pass  # a retry with nothing to do
    elif done_now:
        say(f"parts      {summary.parts} ({done_now} now, {summary.parts_done_before} before)")
    else:
        say(f"parts      {summary.parts}, all already committed: nothing to do")
    if summary.parts_left:
        left = ", ".join(f"{slice_}: {parts:,}" for slice_, parts in list(summary.left.items())[:4])
        more = f" and {len(summary.left) - 4} more slices" if len(summary.left) > 4 else ""
        finalizer = "the driver that commits the last part finalizes the job"
        say(f"left       {summary.parts_left:,} parts ({left}{more}); {finalizer}")
    say(f"rows in    {summary.rows_in:,}" + (" in this slice" if summary.parts_left else ""))
    for name, rows in summary.rows_written.items():
        say(f"written    {rows:,} to model={name}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary.rejected.items())
    say(f"rejected   {sum(summary.rejected.values()):,}" + (f" ({reasons})" if reasons else ""))
    for name, loss in summary.losses.items():
        say(f"loss       {name} {'none: no row has ground truth' if loss is None else format(loss, '.4f')}")
    for name, scores in summary.scores.items():
        say(f"scores     {name} " + ", ".join(f"{kind} {score:.4f}" for kind, score in scores.items()))
    if done_now:
        say(f"speed      {summary.images_per_s:,.0f} images/s, {summary.seconds:.1f} s in total")
    if summary.bottleneck:
        say(f"bottleneck {summary.bottleneck}")
    say(f"results    {summary.output_uri}")


def print_retry(summary: Any) -> None:
    """Print the summary of a finished retry; rows are those of the whole output."""
    if not summary.tried:
        say("retry      nothing to do: there are no rejects with these reasons that can be retried")
    else:
        recovered = ", ".join(f"{rows:,} rows to model={name}" for name, rows in summary.recovered.items() if rows)
        gained = recovered or "no rows recovered"
        say(f"retry      no. {summary.generation}: {summary.tried:,} images tried again, {gained}")
    print_summary(summary)


def print_status(now: Any) -> None:
    """Print how far a run is."""
    unknown = "not counted; --rejects reads each part's footer"
    rows = f"{now.rows_in:,}" if now.rows_in is not None else unknown
    planned = f" of {now.rows_planned:,}" if now.rows_planned is not None else ""
    say(f"state      {'complete' if now.is_complete else 'not complete'}")
    if now.retries_begun:
        left = f", {now.retry_files_left} files of the last retry are left" if now.retry_files_left else ""
        say(f"retried    {now.retries_begun} times{left}")
    if now.generation > now.retries_begun:
        say(f"extended   {now.generation - now.retries_begun} times")
    for name, done in now.parts_done.items():
        written = f", {now.rows_written[name]:,} rows" if now.rows_written is not None else ""
        say(f"model      {name}: {done} of {now.parts} parts{written}")
    say(f"rows in    {rows}{planned}")
    say(f"rejected   {f'{now.rejected:,}' if now.rejected is not None else unknown}")
    say(f"bytes      {now.size_bytes:,}")
    if now.bottleneck:
        here = f"{now.meter['parts_here']} parts of session {now.meter['session']}"
        say(f"bottleneck {now.bottleneck} ({here})")
    if now.retries:
        kinds = ", ".join(f"{kind} {times:,}" for kind, times in sorted(now.retries.items()))
        say(f"retries    {sum(now.retries.values()):,} storage requests were sent again: {kinds}")


def print_plan(plan: Any, probed: Any, done: dict[str, int], is_stored: bool) -> None:
    """Print what a run would do. done: committed parts by model."""
    rows = f"{plan.rows:,}" if plan.rows is not None else "unknown until read"
    size = f"{sum(part.size_bytes for part in plan.parts):,} bytes of input"
    where = "stored in the output" if is_stored else "not stored yet"
    say(f"plan       {len(plan.parts)} parts, {size}, rows {rows}; {where}")
    say(f"dtype      {probed.dtype} on {probed.device}, batches of {probed.batch_size}")
    for name, count in done.items():
        say(f"model      {name}: {count} of {len(plan.parts)} parts committed, identity {plan.identity(name)}")
        for note in probed.cards[name].notes if name in probed.cards else ():
            say(f"  note     {note}")


def print_measured(found: Any, expected: Any, is_auto: bool) -> None:
    """Print the speed of a sample, and the estimate for the whole input."""
    rejected = sum(found.rejected.values())
    say(
        f"measured   {found.images:,} images of {found.parts_sampled} of {found.parts} parts in {found.seconds:.1f} s, "
        f"{rejected:,} rejected; nothing was written"
    )
    say(f"speed      {found.images_per_s:,.1f} images/s with {_count(found.workers, found.worker)}")
    for stage, images_per_s in found.stages.items():
        whose = "the GPU" if stage == "embed" and found.worker == "GPU" else "one CPU"
        say(f"  {stage:<10} {images_per_s:>10,.1f} images/s by {whose}")
    say(f"bottleneck {found.bottleneck}")
    if found.cpus_per_gpu is not None:
        say(f"CPUs       {found.cpus_per_gpu} keep one GPU busy")
    else:
        say(f"CPUs       no GPU here; one CPU prepares {found.cpu_images_per_s:,.0f} images/s for a GPU")
    other = (
        "" if is_auto or found.batch_size == found.batch_size_auto else f", `auto` would use {found.batch_size_auto}"
    )
    say(f"batch      {found.batch_size}{other}")
    about = "about " if found.rows_estimated else ""
    say(f"input      {about}{found.rows:,} images, {found.bytes_in:,} bytes")
    machines = f" on {expected.machines:,} machines like this one" if expected.machines > 1 else ""
    say(f"time       {_duration(expected.eta_s)} with {_count(expected.workers, found.worker)}{machines}")
    for name, size in found.bytes_out.items():
        say(f"output     about {size:,} bytes of model={name}")
    if expected.cost is not None:
        cost = f"{expected.cost:,.2f}" if expected.cost >= 1 else f"{expected.cost:.2g}"
        say(f"cost       {cost}, in the unit of --price-per-hour")
    for note in found.notes:
        say(f"note       {note}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Format seconds in the two largest units: `4 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
