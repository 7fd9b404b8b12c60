"""The normal images of a product: their patches in a bank, and how an extractor makes and keeps banks."""

from adpretrain_hf.reference.bank import ReferenceBank, ReferenceImage, is_bank
from adpretrain_hf.reference.coreset import choose_core, choose_images, describe_images
from adpretrain_hf.reference.folder import bank_files, read_references, write_references
from adpretrain_hf.reference.gathered import Batches
from adpretrain_hf.reference.mixin import Banks, ReferencesMixin
from adpretrain_hf.reference.notice import IS_OWN, RunNotice, check_category, copies_among, say
from adpretrain_hf.reference.per_image import residuals_per_image
