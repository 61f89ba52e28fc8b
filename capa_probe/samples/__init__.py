"""Samples: questions about images, and the places that sets of them are read from.

:func:`load_samples` reads all of them.
"""

from capa_probe.samples.dataset import DatasetSamples
from capa_probe.samples.fingerprint import Fingerprint, data_fingerprint, sample_digest
from capa_probe.samples.jsonl import SAMPLES_FILE
from capa_probe.samples.load import load_samples
from capa_probe.samples.pixels import to_rgb
from capa_probe.samples.sample import ImageSource, Sample

__all__ = [
    "SAMPLES_FILE",
    "DatasetSamples",
    "Fingerprint",
    "ImageSource",
    "Sample",
    "data_fingerprint",
    "load_samples",
    "sample_digest",
    "to_rgb",
]
