"""The dataset format: episodes, task stores, collections. Imports no torch and no gymnasium.

collect   begin_collection -> write_segment ... -> seal_task ... -> commit_collection       collecting.py
read      open_collection -> Collection.select, load, load_training, load_context          collection.py, selection.py
check     verify_collection                                                                  integrity.py
re-cut    relabel_collection                                                                 collecting.py
share     pack_bundle, verify_bundle, unpack_bundle; push_bundle, pull_bundle               bundle.py, transfer.py

Seldom needed, so imported by their modules:

import    list_tasks, import_collection                                                      importing.py
export    export_collection                                                                  exporting.py
merge     merge_collections                                                                  merging.py
"""

from .bundle import BundleReport, pack_bundle, unpack_bundle, verify_bundle
from .collecting import (
    begin_collection,
    commit_collection,
    is_sealed,
    list_segments,
    read_segment,
    relabel_collection,
    seal_task,
    write_segment,
)
from .collection import Collection
from .episodes import QUALITIES, End, Episodes, Quality, Transitions
from .integrity import VerifyReport, verify_collection
from .opening import find_collections, is_committed, open_collection
from .quality import QualityRule, checkpoint_scores, draw_heldout, label_checkpoints
from .records import CollectionHeader, References, TaskRecord, settings_in_effect
from .selection import Selection, Subset
from .tasks import Count, TaskEntry
from .transfer import PushReport, pull_bundle, push_bundle

__all__ = [
    "QUALITIES",
    "BundleReport",
    "Collection",
    "CollectionHeader",
    "Count",
    "End",
    "Episodes",
    "PushReport",
    "Quality",
    "QualityRule",
    "References",
    "Selection",
    "Subset",
    "TaskEntry",
    "TaskRecord",
    "Transitions",
    "VerifyReport",
    "begin_collection",
    "checkpoint_scores",
    "commit_collection",
    "draw_heldout",
    "find_collections",
    "is_committed",
    "is_sealed",
    "label_checkpoints",
    "list_segments",
    "open_collection",
    "pack_bundle",
    "pull_bundle",
    "push_bundle",
    "read_segment",
    "relabel_collection",
    "seal_task",
    "settings_in_effect",
    "unpack_bundle",
    "verify_bundle",
    "verify_collection",
    "write_segment",
]
