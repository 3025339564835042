"""Small DICOM files of one frame, made by hand."""

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

SECRET = "Doe^Jane^19610214"


def dataset(pixels, bits=12, photometric="MONOCHROME2", **attributes):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"
    ds.PatientName = ds.StudyDescription = SECRET
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = pixels.dtype.itemsize * 8, bits, bits - 1
    ds.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(ds, name, value)
    return ds


def saved(path, ds):
    ds.save_as(path, enforce_file_format=True)
    return path


def lut(entries, first, bits, data):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [entries, first, bits], data
    return Sequence([item])
