"""Run a few loops as code compiled for the processor they run on, with torch as the fallback."""
