"""COCO results: average precision with intervals, comparison of two detectors, the package for the test server.

Framework-free. `results` reads and checks result files, `average_precision` scores them, `submission` packs them,
`shards` keeps those of an inference that may be killed, `box_averaging` merges boxes of several views of an image.
`seeds` has the statistics of trainings that differ in their seed.
"""
