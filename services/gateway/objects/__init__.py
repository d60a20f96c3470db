"""The artifact store: clips, latents, checkpoints and pictures, in a folder or in a bucket."""

from services.gateway.objects.location import checked_url, open_store, until_usable
from services.gateway.objects.store import ArtifactsAway, ObjectInfo, Store

__all__ = ["ArtifactsAway", "ObjectInfo", "Store", "checked_url", "open_store", "until_usable"]
