"""The surgeon for ONNX files: the same methods and plans as for a network of torch (extra ``onnx``)."""

from normsearch.onnx_graph.calibration import calibrate, calibration_record
from normsearch.onnx_graph.conversion import convert
from normsearch.onnx_graph.files import load, save
from normsearch.onnx_graph.measuring import compare
from normsearch.onnx_graph.planning import explain, find_sites, plan
from normsearch.onnx_graph.reporting import document
from normsearch.onnx_graph.sensitivity import sensitivity

__all__ = [
    "calibrate",
    "calibration_record",
    "compare",
    "convert",
    "document",
    "explain",
    "find_sites",
    "load",
    "plan",
    "save",
    "sensitivity",
]
