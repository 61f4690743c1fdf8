"""Say why a fault that no test notices is none: by the fault's key, as the run prints it."""

REASONS = {
    "dataset/part_file.py is_intact: position < 0 or start < 7 -> (position < 0 and start < 7)": (
        "where there is no digest, the bytes that are compared in its place are none either"
    ),
    "dataset/finalize.py FooterTotals._count: "
    "len(self.pending) >= FILES_AT_ONCE -> (len(self.pending) > FILES_AT_ONCE)": (
        "how many files are packed at a time bounds memory, and one more changes no row"
    ),
}
