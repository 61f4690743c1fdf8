"""Programs that exercise the product at length; short versions of them run as tests."""
