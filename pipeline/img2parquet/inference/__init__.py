"""Run a batch through decoding, preprocessing, the models and their outputs.

steps.py             run the two steps of a worker: prepare (decode and crop), embed (models and outputs)
forward.py           run one model on a batch and compute the columns of its outputs
device.py            overlap copying to a GPU, computing on it and fetching from it
cuda_graphs.py       replay a forward pass as one CUDA graph where that is faster
capabilities.py      find out what a worker can do: cards, dtype, device, batch size
device_selection.py  choose between CPU and GPU, and refuse to leave a GPU idle by accident
batch_size.py        resolve `batch_size: auto`
allocator.py         tune glibc's memory allocator
embed_images.py      embed images at hand, without a job
image_losses.py      compare images at hand with their ground truth
"""
