"""Turn image bytes into pixels, and pixels into crops of the model's input size.

headers.py       read format, size and orientation from the first bytes, and detect files that are cut off
decode.py        decode image bytes to upright RGB pixels, or reject them with a reason
orientation.py   read how an image is turned from EXIF or XMP
jpeg_repair.py   take defects out of a JPEG that cost no pixel
png_chunks.py    check a PNG's chunks, and separate pixels from metadata
tiff.py          open a TIFF's first page as its tags say, or refuse it
bmp.py           open a BMP as its header says
preprocess.py    resize and crop pixels as the checkpoint's processor does
jpeg_scaling.py  choose how much smaller a JPEG may be decoded (`preprocess: fast`)
thumbnails.py    make small WebP images for reports
"""
