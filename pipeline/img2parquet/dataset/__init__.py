"""Plan an output, commit its parts exactly once, and finalize it.

| file | what it does |
|---|---|
| `plan.py` | divides the input into parts, once, and stores the plan |
| `packed_parts.py` | holds the parts of a large plan in little memory |
| `slices.py` | divides a plan among several drivers |
| `part_file.py` | encodes the rows and rejects of a part as a Parquet file |
| `footer.py` | reads what a part file says about itself |
| `commit.py` | creates part files and records exactly once |
| `sealed_json.py` | writes JSON records that reveal any changed byte |
| `listing.py` | holds the names of a large output in little memory |
| `damage.py` | names the file when a damaged one cannot be read |
| `finalize.py` | ends a generation: rejects, manifest, totals, `_SUCCESS` |
| `generations.py` | reads what retries and extensions added to an output |
| `extension.py` | plans a generation for files added to the input |
| `retry_plan.py` | plans a generation that tries rejects again |
| `rejects.py` | works out which rejects are open after retries |
| `derived.py` | locates partitions made from another partition's rows |
"""
