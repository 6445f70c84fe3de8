"""The names of the published systems of which `docs/systems.yaml` must hold a row.

Encoders, and models that join a picture or a film to a language model; who keeps the list of
systems adds a name here, and a test asks for its row.
"""

ENCODERS = """
    2D-SSM; A2MIM; ADDP; Agent Attention; AIMv2; ALIGN; As-ViT; AttMask; Augmented Shortcuts;
    AVSiam; BEiT; BEiT v2; BiFormer; BigBiGAN; BiT; ByteFormer; CAE; Cap / CapPa; CAS-ViT;
    CBNetV2; ChannelViT; CLIP; CLIP with Quality Captions; ConVIRT; ConViT; ConvMixer; CPVT
    (PEG); CroCo; CropMAE; CrossFormer; CrossViT; CSWin; CvT; D-iGPT; DaViT; DeiT; DeiT III;
    DiNAT; DiST; DiT (document); DropPos; DSeq-JEPA; DTM; DuoFormer; DVT (Denoising ViT);
    Dynamic-conv ViT; EfficientFormer; EfficientFormerV2; EVA; EVA-02; FasterViT; FcaFormer;
    FIT; FTFI; GC ViT; GMML; Hallucinator; Heuristic multi-task pre-training; Hiera; HorNet;
    Hyena N-D; ICMLM; IG-hashtag WSL; iLLaMA; iRPE; LaPE; LIT; LITv2 (HiLo); LookHere;
    LowFormer; M3I; MAE-Thorax; MAFormer; Mask3D; MaxViT; Meta-SpikeFormer; MetaFormer /
    PoolFormer; MMC; MobileViTv2; MoBY; MP3 (position prediction); MR-MAE; MViT; MViTv2; NesT;
    NFNet at scale; OWL-ViT; Patch scaling; Patternformer; PiT; PixelTransformer; POA;
    PolyphaseViT; PPMA; PVT; QuadTree Attention; RAD-DINO; REFERS; Registers; ReLU-attention;
    RMT; S2AFormer; SAG-ViT; SatMAE++; Scaling ViT (ViT-G/14); Self-Supervised ViT-Path;
    SG-Former; SIGMA; SiT; SparK; SpectFormer; SteerableTransformer; Supervised+MIM; SVT
    (Scattering ViT); SWAG; Swin; T2T-ViT; TiC; TinyViT; TIPS; TNT; Token Boosting Module;
    TokenFlow; TurboViT; Uni4Eye; UNIT; UniTok; UTA; VATT; VideoMAE V2; ViR; ViT; ViT-22B;
    ViT-CoMer; ViT-ResNAS; ViTamin; ViViT; VPD; X-CLIP; XCiT
"""

MODELS = """
    All-in-one; Arabic-Nougat; BPE Image Tokenizer; CPTR; Emu; EVE; GIT; HoVLE; JetFormer;
    LXMERT; ML-Mamba; MMAR; mmMamba; SOLO; Uni4D-LLM; Unicoder-VL; UniFork; VideoBERT;
    VideoLLaMA3; VISTA; VL-GPT; VLMo; VLMT; Fuyu
"""

CONNECTORS = """
    Arcana; BridgeTower; COMM; DPT; EEVG; eP-ALM; FIBER; Florence-VL; LG-QFormer; Libra; LiMBeR;
    LM4Visual; MouSi; MoVA; PMA-Net; TransVG++; Unimodal-to-Multimodal projectors; X-Former; XBT
"""

OTHERS = """
    PLLaVA; MouSi; COMM; Eventful Transformers; SimVLG
"""

WORK = """
    SOLO; Fuyu; VideoLLaMA3; All-in-one; PLLaVA; MouSi; COMM; Registers; ChannelViT; LookHere
"""


def names(text: str) -> set[str]:
    """Return the names of a list."""
    return {" ".join(name.split()) for name in text.split(";")}
