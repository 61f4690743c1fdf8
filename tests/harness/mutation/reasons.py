"""Say why a fault that no test notices is none: by the fault's key, as the run prints it."""

REASONS = {
    "dataset/part_file.py is_intact: position < 0 or start < 7 -> (position < 0 and start < 7)": (
        "where there is no digest, the bytes that are compared in its place are none either"
    ),
    "images/tiff.py _is_plain_ycbcr: 0 -> 1 #2": ("a TIFF that does not say how high it is has been refused before"),
    "dataset/finalize.py FooterTotals._count: "
    "len(self.pending) >= FILES_AT_ONCE -> (len(self.pending) > FILES_AT_ONCE)": (
        "how many files are packed at a time bounds memory, and one more changes no row"
    ),
}
