"""Image-text data: embedded scenes, the user's own pairs, and the loaders that batch them."""

from typing import TYPE_CHECKING

from mmtransformer.lazy import lazy

if TYPE_CHECKING:
    from mmtransformer.data.captions import CaptionData as CaptionData
    from mmtransformer.data.class_sources import ImageFolder as ImageFolder
    from mmtransformer.data.class_sources import SceneShapes as SceneShapes
    from mmtransformer.data.classes import ClassData as ClassData
    from mmtransformer.data.documents.documents import PairsAsDocuments as PairsAsDocuments
    from mmtransformer.data.documents.interleaved import InterleavedFiles as InterleavedFiles
    from mmtransformer.data.files.read_options import ReadOptions as ReadOptions
    from mmtransformer.data.files.read_options import TextReadOptions as TextReadOptions
    from mmtransformer.data.files.shards import TarShards as TarShards
    from mmtransformer.data.hub_pairs import HubPairs as HubPairs
    from mmtransformer.data.interleaved_data import InterleavedData as InterleavedData
    from mmtransformer.data.loading.features import FeatureCacheConfig as FeatureCacheConfig
    from mmtransformer.data.loading.module import DataModule as DataModule
    from mmtransformer.data.loading.module import LoaderConfig as LoaderConfig
    from mmtransformer.data.loading.module import Splits as Splits
    from mmtransformer.data.loading.source import Caption as Caption
    from mmtransformer.data.loading.source import Pairs as Pairs
    from mmtransformer.data.loading.source import PairSource as PairSource
    from mmtransformer.data.mixture import DocumentMixture as DocumentMixture
    from mmtransformer.data.mixture import Mixture as Mixture
    from mmtransformer.data.open_sources import open_pairs as open_pairs
    from mmtransformer.data.pairs import PairFiles as PairFiles
    from mmtransformer.data.parallel_texts import SceneTranslations as SceneTranslations
    from mmtransformer.data.scenes.scene_documents import SceneDocuments as SceneDocuments
    from mmtransformer.data.scenes.scenes import Scenes as Scenes
    from mmtransformer.data.scenes.world import SceneWorld as SceneWorld
    from mmtransformer.data.text_only.masked import MaskedTextData as MaskedTextData
    from mmtransformer.data.text_only.text_source import CaptionTexts as CaptionTexts
    from mmtransformer.data.text_only.text_source import TextFiles as TextFiles
    from mmtransformer.data.text_only.texts import TextData as TextData
    from mmtransformer.data.translation import TranslationData as TranslationData

__getattr__, __dir__, __all__ = lazy(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]
