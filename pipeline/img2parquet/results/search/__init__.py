"""Search an output's embeddings, and find duplicates.

search.py       find the rows nearest to an image, to another row or to words
query_image.py  embed a query image as the run embedded its own
query_text.py   embed words with the text tower of the run's model
row_filter.py   parse a filter over columns
index.py        build and read a vector index that grows with the output
duplicates.py   group near-duplicates, and write the groups as a Parquet file
html_page.py    render the result of a search as one HTML page
"""
