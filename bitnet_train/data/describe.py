"""What a run is trained on, in words: for start-up lines, estimates and model cards."""

from pathlib import Path

from bitnet_train.data.config import CorpusConfig, DataConfig, DatasetConfig, HubCorpus, MixtureCorpus
from bitnet_train.data.images.config import HubSource, ImageDataConfig
from bitnet_train.data.mixture import parts, shares_text, stages


def describe(cfg: DatasetConfig, max_steps: int) -> str:
    """The corpus or the images by name; a hub data set with what was chosen of it; a mixture with its shares in every
    stage.

    Local paths are left out: cards are published.
    """
    if isinstance(cfg, ImageDataConfig):
        return _images(cfg)
    assert isinstance(cfg, DataConfig)
    if not isinstance(cfg.corpus, MixtureCorpus):
        return _corpus(cfg.corpus)
    found = parts(cfg.corpus)
    corpora = ", ".join(f"{name}: {_corpus(part.corpus)}" for name, part in found.items())
    shares = [
        f"{f'from step {stage.step:,} ' if stage.step else ''}{shares_text(list(found), stage.counts)}"
        for stage in stages(cfg, max_steps)
    ]
    return f"mixture of {len(found)} corpora ({'; '.join(shares)}; {corpora})"


def _corpus(cfg: CorpusConfig) -> str:
    if not isinstance(cfg, HubCorpus):
        return str(cfg.name)
    chosen = [_public(cfg.path), *([cfg.subset] if cfg.subset else []), f"split {cfg.split}"]
    chosen += [f"revision {cfg.revision}"] if cfg.revision else []
    chosen += [f"the first {cfg.max_documents:,} rows"] if cfg.max_documents else []
    return f"{cfg.name} ({', '.join(chosen)})"


def _images(cfg: ImageDataConfig) -> str:
    source = cfg.source
    if not isinstance(source, HubSource):
        return str(source.name)
    chosen = [_public(source.path), *([source.subset] if source.subset else []), f"split {source.train_split}"]
    return f"{source.name} ({', '.join(chosen)})"


def _public(path: str) -> str:
    """The name of a data set of the hub; the path of a local one is not said."""
    local = Path(path).expanduser().exists() or path.startswith(("/", ".", "~"))
    return "a local data set" if local else path
