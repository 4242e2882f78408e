"""People in images: verification of pairs, galleries of known people, identification, and the faces in photos.

`embeddings` opens the network and embeds images, `face_finder` is the MTCNN cascade, `face_photos` aligns its faces.
"""

__all__ = [
    "cascade_weights",
    "embeddings",
    "enrolment",
    "export_finder",
    "face_crops",
    "face_finder",
    "face_photos",
    "gallery_file",
    "identification",
    "verification",
]
